"""What a role needs of its engine config, and how KV leaves and enters a worker. Sees one document."""

from __future__ import annotations

from collections.abc import Iterator

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.kv import kv_bytes_per_token, shown_bytes
from trtllm_workers.lint.rules.rule import (
    BACKENDS,
    DISAGGREGATED,
    DocumentRule,
    Facts,
    switched_off,
    transceiver_backend,
    whole_blocks,
)
from trtllm_workers.types import Role

SLOW_LINK_BYTES_PER_S = 1_250_000_000
"""The slowest link a KV timeout should survive: 10 Gbit/s Ethernet."""

_SECTION = "cache_transceiver_config"


def prefill_overlap(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The overlap scheduler must be off on prefill workers."""
    key = "disable_overlap_scheduler"
    if doc.role is not Role.PREFILL or doc.get(key) is True:
        return
    if facts.context.sets_role_keys and not doc.given(key):
        return
    yield doc.problem(
        Severity.ERROR,
        "prefill-overlap",
        key,
        "a prefill worker cannot use the overlap scheduler, and it is on",
        advice=f"write {key}: true",
    )


def transceiver_missing(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Prefill and decode workers need a transceiver backend."""
    key = f"{_SECTION}.backend"
    if doc.role not in DISAGGREGATED or transceiver_backend(doc, facts) is not None:
        return
    if doc.given(key) and key not in doc.values:
        return  # a value of the wrong type was reported
    off = switched_off(doc, _SECTION) or doc.given(key)
    if not off and facts.context.sets_role_keys:
        return
    yield doc.problem(
        Severity.ERROR,
        "transceiver-missing",
        key,
        f"the KV transceiver of a {doc.role} worker is off: TensorRT-LLM reads no backend as none",
        advice=f"write {key}: UCX (or NIXL), the same on prefill and decode",
    )


def transceiver_default(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The backend DEFAULT means different things in different places."""
    key = f"{_SECTION}.backend"
    if doc.get(key) != "DEFAULT":
        return
    yield doc.problem(
        Severity.WARNING,
        "transceiver-default",
        key,
        "DEFAULT is NIXL in TensorRT-LLM 1.2 (it was UCX in 1.0), and a variable "
        "TRTLLM_USE_<NIXL|UCX|MOONCAKE|MPI>_KVCACHE=1 changes it unseen",
        advice="write UCX or NIXL",
    )


def transceiver_deprecated(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The backend MPI is on its way out."""
    key = f"{_SECTION}.backend"
    if doc.get(key) == "MPI":
        yield doc.problem(
            Severity.WARNING,
            "transceiver-deprecated",
            key,
            "TensorRT-LLM has deprecated the MPI transceiver",
            advice="write UCX or NIXL",
        )


def transceiver_transport(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The file and the launcher's flag must not ask for different backends."""
    key = f"{_SECTION}.backend"
    asked = (facts.context.kv_transport or "").upper()
    given = doc.get(key)
    if given is None or given == asked or doc.role not in DISAGGREGATED:
        return
    if asked not in BACKENDS:
        return
    yield doc.problem(
        Severity.ERROR,
        "transceiver-transport",
        key,
        f"the file says {given}, --kv-transport says {asked}",
        advice=f"remove the key, or write {asked}",
    )


def transceiver_beams(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Disaggregation knows no beam search."""
    beams = doc.get("max_beam_width")
    if doc.role in DISAGGREGATED and isinstance(beams, int) and beams > 1:
        yield doc.problem(
            Severity.ERROR,
            "transceiver-beams",
            "max_beam_width",
            f"a beam width of {beams}: KV of beams cannot be handed to another worker",
            advice="write max_beam_width: 1, or serve beam search on aggregated workers",
        )


def transceiver_buffer(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The transceiver's buffer must hold the longest prompt."""
    key = f"{_SECTION}.max_tokens_in_buffer"
    if doc.role not in DISAGGREGATED or (doc.given(key) and key not in doc.values):
        return
    isl, longest, size = facts.context.isl, doc.get("max_seq_len"), doc.get(key)
    wanted = isl or longest
    write = (
        f"write {key}: {whole_blocks(doc, wanted)}"
        if wanted
        else f"write {key}: the longest prompt in tokens"
    )
    if size is None:
        yield doc.problem(
            Severity.WARNING,
            "transceiver-buffer",
            key,
            "unset: the buffer's size then comes from a variable in bytes, and nothing tells whether "
            "the longest prompt fits",
            advice=write,
        )
    elif isl is not None and size < isl:
        yield doc.problem(
            Severity.ERROR,
            "transceiver-buffer",
            key,
            f"a prompt of {isl} tokens does not fit the buffer of {size}: under load both sides wait "
            "for each other for ever",
            advice=write,
            arithmetic=(f"{size} tokens in the buffer < {isl} tokens of the longest input",),
        )
    elif doc.role is Role.PREFILL and isinstance(longest, int) and size < longest:
        yield doc.problem(
            Severity.WARNING,
            "transceiver-buffer",
            key,
            f"max_seq_len lets in prompts of up to {longest} tokens, the buffer holds {size}; one that "
            "is longer than the buffer can dead-lock both workers",
            advice=f"write {key}: {whole_blocks(doc, longest)}, or lower max_seq_len",
            arithmetic=(f"{size} tokens in the buffer < max_seq_len {longest}",),
        )


def transceiver_buffer_blocks(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The transceiver's buffer holds whole blocks."""
    key = f"{_SECTION}.max_tokens_in_buffer"
    size, block = doc.get(key), doc.get("kv_cache_config.tokens_per_block")
    if not isinstance(size, int) or not isinstance(block, int) or block < 1 or size % block == 0:
        return
    yield doc.problem(
        Severity.WARNING,
        "transceiver-buffer-blocks",
        key,
        f"{size} tokens are no whole number of blocks of {block}; the transceiver checks that when it "
        "starts, and the engine may end there",
        advice=f"write {key}: {whole_blocks(doc, size)}",
        arithmetic=(f"{size} mod {block} = {size % block}",),
    )


def transceiver_timeout(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A KV transfer needs a time limit, and one that a slow link can keep."""
    key = f"{_SECTION}.kv_transfer_timeout_ms"
    if doc.role not in DISAGGREGATED or (doc.given(key) and key not in doc.values):
        return
    limit = doc.get(key)
    if limit is None:
        if doc.given(key) or not facts.context.sets_role_keys:
            yield doc.problem(
                Severity.WARNING,
                "transceiver-timeout",
                key,
                "no time limit: a transfer whose sender is gone waits for ever and keeps its blocks",
                advice=f"write {key}: 60000, or longer for long prompts on slow links",
            )
        return
    isl, model = facts.context.isl, facts.model
    if isl is None or model is None:
        return
    per_token = kv_bytes_per_token(doc, model)
    needed_ms = isl * per_token / SLOW_LINK_BYTES_PER_S * 1000
    if limit < needed_ms:
        yield doc.problem(
            Severity.WARNING,
            "transceiver-timeout",
            key,
            f"{limit} ms is too short for the KV of {isl} tokens over a link of 10 Gbit/s",
            advice=f"write {key}: {_round_up(2 * needed_ms)} (twice the time of one transfer)",
            arithmetic=(
                f"{isl} tokens × {per_token:.0f} bytes = {shown_bytes(isl * per_token)}",
                f"{shown_bytes(isl * per_token)} / 1.25 GB/s = {needed_ms:.0f} ms > {limit} ms",
            ),
        )


def transceiver_unused(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Only prefill and decode workers hand KV over."""
    if doc.role in DISAGGREGATED or doc.get(f"{_SECTION}.backend") is None:
        return
    yield doc.problem(
        Severity.NOTE,
        "transceiver-unused",
        _SECTION,
        f"a worker of role {doc.role} hands no KV over; the transceiver only takes memory for its buffer",
        advice=f"remove {_SECTION}",
    )


def encoder_only(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Loading only the encoder and generating exclude each other, as do encoding and speculation."""
    if doc.role is Role.ENCODE:
        if doc.has_section("speculative_config"):
            yield doc.problem(
                Severity.WARNING,
                "encoder-only",
                "speculative_config",
                "an encode worker generates nothing, so there is nothing to speculate on",
                advice="remove speculative_config",
            )
    elif doc.get("mm_encoder_only") is True:
        yield doc.problem(
            Severity.ERROR,
            "encoder-only",
            "mm_encoder_only",
            f"only the encoder would be loaded, but a worker of role {doc.role} generates",
            advice="remove mm_encoder_only, or give the worker the role encode",
        )


def _round_up(milliseconds: float) -> int:
    return -(-int(milliseconds) // 1000) * 1000


DOCUMENT_RULES: tuple[DocumentRule, ...] = (
    prefill_overlap,
    transceiver_missing,
    transceiver_default,
    transceiver_deprecated,
    transceiver_transport,
    transceiver_beams,
    transceiver_buffer,
    transceiver_buffer_blocks,
    transceiver_timeout,
    transceiver_unused,
    encoder_only,
)

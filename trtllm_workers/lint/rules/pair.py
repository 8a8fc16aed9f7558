"""What a prefill and a decode worker must have in common for KV to fit on both sides, and an encode worker
with those that take its embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.rule import Facts, PairRule, transceiver_backend, whole_blocks

# Keys that change what the model computes or how it reads text.
_MODEL_KEYS = ("revision", "load_format", "enable_lora", "checkpoint_format", "tokenizer")
_SPARSE = "sparse_attention_config"


def pair_kv_dtype(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """KV has one dtype on both sides."""
    yield from _differs(
        "pair-kv-dtype",
        "kv_cache_config.dtype",
        prefill,
        decode,
        "KV blocks are copied byte for byte, so the decode worker would read nonsense",
    )


def pair_block_size(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Blocks have one size on both sides."""
    yield from _differs(
        "pair-block-size",
        "kv_cache_config.tokens_per_block",
        prefill,
        decode,
        "blocks of one side do not fit the other's, and the router finds no block again",
    )


def pair_transceiver(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Both sides speak the same transceiver."""
    mine, theirs = transceiver_backend(prefill, facts), transceiver_backend(decode, facts)
    if mine is None or theirs is None or mine == theirs:
        return
    yield decode.problem(
        Severity.ERROR,
        "pair-transceiver",
        "cache_transceiver_config.backend",
        f"{theirs} here and {mine} in {prefill.name}: the two cannot talk to each other",
        advice=f"write the same backend in {prefill.name} and {decode.name}",
    )


def pair_buffer(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Both transceiver buffers hold what prefill accepts."""
    key = "cache_transceiver_config.max_tokens_in_buffer"
    mine, theirs = prefill.get(key), decode.get(key)
    longest = prefill.get("max_seq_len")
    if isinstance(theirs, int) and isinstance(longest, int) and theirs < longest:
        yield decode.problem(
            Severity.WARNING,
            "pair-buffer",
            key,
            f"{prefill.name} takes prompts of up to {longest} tokens, the buffer here holds {theirs}; a "
            "longer prompt can dead-lock both workers",
            advice=f"write {key}: {whole_blocks(decode, longest)}",
            arithmetic=(f"{theirs} tokens in the buffer < max_seq_len {longest} of prefill",),
        )
    elif isinstance(mine, int) and isinstance(theirs, int) and mine != theirs:
        yield decode.problem(
            Severity.WARNING,
            "pair-buffer",
            key,
            f"the buffer holds {theirs} tokens here and {mine} in {prefill.name}: the smaller one decides",
            advice=f"write {key}: {max(mine, theirs)} on both sides",
        )


def pair_dtype(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Both sides compute in one dtype."""
    yield from _differs(
        "pair-dtype",
        "dtype",
        prefill,
        decode,
        "KV takes its dtype from the model's where its own is auto, and answers would depend on the path",
    )


def pair_length(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Both sides take the same sequences."""
    mine, theirs = prefill.get("max_seq_len"), decode.get("max_seq_len")
    if not isinstance(mine, int) or not isinstance(theirs, int):
        return
    if theirs > mine:
        yield decode.problem(
            Severity.NOTE,
            "pair-length",
            "max_seq_len",
            f"{theirs} here and {mine} in {prefill.name}: the shorter one bounds every request, its answer "
            "included",
            advice=f"write max_seq_len: {theirs} in {prefill.name}",
        )
    elif theirs < mine:
        yield decode.problem(
            Severity.WARNING,
            "pair-length",
            "max_seq_len",
            f"{prefill.name} takes prompts of up to {mine} tokens, but sequences end at {theirs} here: "
            "the longest prompts are computed and then refused",
            advice=f"write max_seq_len: {mine} plus the longest output",
            arithmetic=(f"decode {theirs} < prefill {mine}",),
        )


def pair_model(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Both sides load the same model, in the same way."""
    sparse = sorted(
        key for key in {*prefill.values, *decode.values} if key.startswith(f"{_SPARSE}.")
    )
    for key in (*_MODEL_KEYS, *sparse):
        mine, theirs = prefill.get(key), decode.get(key)
        if key == "load_format":  # TensorRT-LLM reads it in any case
            mine, theirs = str(mine).upper(), str(theirs).upper()
        if mine != theirs:
            yield from _differs(
                "pair-model", key, prefill, decode, "the two sides would not run the same model"
            )


def pair_attention_window(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Layers keep the same windows of KV on both sides."""
    yield from _differs(
        "pair-attention-window",
        "kv_cache_config.max_attention_window",
        prefill,
        decode,
        "layers then keep different numbers of blocks, and those of one side are missing on the other",
    )


def pair_block_reuse(prefill: Document, decode: Document, facts: Facts) -> Iterator[Problem]:
    """Reuse of blocks may differ; it is seldom meant to."""
    yield from _differs(
        "pair-block-reuse",
        "kv_cache_config.enable_block_reuse",
        prefill,
        decode,
        "that works, but only one side finds the blocks of earlier requests again",
        severity=Severity.NOTE,
    )


def encode_dtype(encode: Document, other: Document, facts: Facts) -> Iterator[Problem]:
    """Embeddings are made in the dtype in which they are read."""
    yield from _differs(
        "encode-dtype",
        "dtype",
        encode,
        other,
        "embeddings go from one to the other as they are, so their bytes would be read as other numbers",
    )


def encode_model(encode: Document, other: Document, facts: Facts) -> Iterator[Problem]:
    """The vision tower is that of the model."""
    for key in ("revision", "checkpoint_format"):
        yield from _differs(
            "encode-model",
            key,
            encode,
            other,
            "the embeddings would be those of another model's vision tower",
        )


def _differs(
    rule: str,
    key: str,
    prefill: Document,
    decode: Document,
    reason: str,
    *,
    severity: Severity = Severity.ERROR,
) -> Iterator[Problem]:
    mine, theirs = prefill.get(key), decode.get(key)
    if mine == theirs or _unread(prefill, key) or _unread(decode, key):
        return
    yield decode.problem(
        severity,
        rule,
        key,
        f"{_told(theirs)} here and {_told(mine)} in {prefill.name}: {reason}",
        advice=f"write the same {key} in {prefill.name} and {decode.name}",
    )


def _unread(doc: Document, key: str) -> bool:
    """Return whether the key is given but was of a wrong type, which has been reported."""
    return doc.given(key) and key not in doc.values


def _told(value: Any) -> str:
    if value is None:
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


ENCODE_RULES: tuple[PairRule, ...] = (encode_dtype, encode_model)
"""The encode document comes first, then that of a worker that takes its embeddings."""

PAIR_RULES: tuple[PairRule, ...] = (
    pair_kv_dtype,
    pair_block_size,
    pair_transceiver,
    pair_buffer,
    pair_dtype,
    pair_length,
    pair_model,
    pair_attention_window,
    pair_block_reuse,
)

"""Batch, token and length limits of one engine config against each other and the workload."""

from __future__ import annotations

from collections.abc import Iterator

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.graphs import (
    DEFAULT_LARGEST_GRAPH,
    graph_key,
    graph_sizes,
)
from trtllm_workers.lint.rules.rule import (
    DISAGGREGATED,
    DocumentRule,
    Facts,
    batch_size,
    draft_key,
    draft_tokens,
    max_num_tokens,
    switched_off,
)
from trtllm_workers.types import Role

HIGH_FRACTION = 0.95
"""The share of free memory for KV from which on workers with a transceiver ran out of memory."""
TINY_FRACTION = 0.05
"""A share of free memory for KV below which a slip of the pen is likelier than an intention."""


def batch_above_tokens(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A step that computes fewer tokens than streams never runs a full batch."""
    batch, tokens = batch_size(doc), max_num_tokens(doc)
    if doc.role is Role.ENCODE or batch <= tokens:
        return
    key = "max_batch_size" if doc.given("max_batch_size") else "max_num_tokens"
    default = "" if doc.given("max_batch_size") else ", TensorRT-LLM's default,"
    yield doc.problem(
        Severity.WARNING,
        "batch-above-tokens",
        key,
        f"max_batch_size {batch}{default} is above max_num_tokens {tokens}: no step can run a full batch",
        advice=f"write max_num_tokens: {batch} or more, or max_batch_size: {tokens} or less",
    )


def prompt_above_tokens(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Without chunked prefill a prompt must fit one step."""
    isl, tokens = facts.context.isl, max_num_tokens(doc)
    if not _prefills_whole(doc) or isl is None or isl <= tokens:
        return
    yield doc.problem(
        Severity.ERROR,
        "prompt-above-tokens",
        "max_num_tokens",
        f"prompts of {isl} tokens are refused: without chunked prefill a prompt must fit one step of {tokens}",
        advice=f"write enable_chunked_prefill: true, or max_num_tokens: {isl}",
        arithmetic=(f"longest input {isl} > max_num_tokens {tokens}",),
    )


def sequence_above_tokens(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Without chunked prefill a limit on sequences above one step's tokens promises too much."""
    longest, tokens, isl = doc.get("max_seq_len"), max_num_tokens(doc), facts.context.isl
    if not _prefills_whole(doc) or not isinstance(longest, int) or longest <= tokens:
        return
    if isl is not None:
        return  # the longest prompt is known, and prompt-above-tokens judges it
    yield doc.problem(
        Severity.WARNING,
        "sequence-above-tokens",
        "max_seq_len",
        f"prompts of more than {tokens} tokens are refused although max_seq_len is {longest}: without "
        "chunked prefill a prompt must fit one step",
        advice=f"write enable_chunked_prefill: true, or max_num_tokens: {longest}",
        arithmetic=(f"max_seq_len {longest} > max_num_tokens {tokens}",),
    )


def sequence_too_short(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Prompt and answer together must fit max_seq_len."""
    isl, longest = facts.context.isl, doc.get("max_seq_len")
    if isl is None or not isinstance(longest, int) or doc.role is Role.ENCODE:
        return
    # A prefill worker computes the first token of the answer and no more.
    osl = 1 if doc.role is Role.PREFILL else facts.context.osl
    if osl is None or longest >= isl + osl:
        return
    yield doc.problem(
        Severity.ERROR,
        "sequence-too-short",
        "max_seq_len",
        f"sequences of {isl + osl} tokens do not fit {longest}",
        advice=f"write max_seq_len: {isl + (facts.context.osl or osl)}",
        arithmetic=(f"{isl} input + {osl} output = {isl + osl} > {longest}",),
    )


def input_too_short(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A max_input_len below the longest input may refuse prompts."""
    isl, limit = facts.context.isl, doc.get("max_input_len")
    if isl is None or not doc.given("max_input_len") or not isinstance(limit, int) or limit >= isl:
        return
    yield doc.problem(
        Severity.WARNING,
        "input-too-short",
        "max_input_len",
        f"prompts of {isl} tokens are above max_input_len {limit} (TensorRT-LLM's PyTorch backend is "
        "believed not to enforce it)",
        advice="remove max_input_len: max_seq_len is the limit that counts",
    )


def draft_graph_tokens(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A speculating step needs room for the drafts of the largest CUDA graph's batch."""
    short = _graph_shortage(doc)
    if short is None:
        return
    largest, drafts, needed = short
    tokens, name = max_num_tokens(doc), draft_key(doc)
    yield doc.problem(
        Severity.ERROR,
        "draft-graph-tokens",
        "max_num_tokens",
        f"a step of {tokens} tokens is too small for the largest CUDA graph with its draft tokens",
        advice=f"write max_num_tokens: {needed}, or a largest CUDA graph of {tokens // (drafts + 1)}",
        arithmetic=(
            f"{largest} streams × ({name} {drafts} + 1) = {needed} > max_num_tokens {tokens}",
        ),
    )


def draft_batch_tokens(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A speculating decode step needs room for the drafts of a full batch."""
    batch, drafts, tokens = batch_size(doc), draft_tokens(doc), max_num_tokens(doc)
    if doc.role is not Role.DECODE or drafts < 1 or _graph_shortage(doc) is not None:
        return
    needed = batch * (drafts + 1)
    if tokens >= needed:
        return
    yield doc.problem(
        Severity.WARNING,
        "draft-batch-tokens",
        "max_num_tokens",
        f"a step of {tokens} tokens cannot hold a full batch with its draft tokens",
        advice=f"write max_num_tokens: {needed}, or max_batch_size: {tokens // (drafts + 1)}",
        arithmetic=(
            f"max_batch_size {batch} × ({draft_key(doc)} {drafts} + 1) = {needed} > max_num_tokens {tokens}",
        ),
    )


def graph_above_batch(doc: Document, facts: Facts) -> Iterator[Problem]:
    """CUDA graphs above max_batch_size are never run."""
    key, batch = graph_key(doc), batch_size(doc)
    if key == "cuda_graph_config":
        return
    above = [size for size in graph_sizes(doc) if size > batch]
    if above:
        yield doc.problem(
            Severity.WARNING,
            "graph-above-batch",
            key,
            f"CUDA graphs for batches of {_few(above)} are never run: max_batch_size is {batch}",
            advice=f"remove them from batch_sizes, or raise max_batch_size to {above[-1]}"
            if key.endswith("batch_sizes")
            else f"write cuda_graph_config.max_batch_size: {batch}",
        )


def graph_below_batch(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Batches above the largest CUDA graph run without one."""
    batch = doc.get("max_batch_size")
    if not isinstance(batch, int) or doc.role not in (Role.AGGREGATED, Role.DECODE):
        return
    if switched_off(doc, "cuda_graph_config") or graph_key(doc) != "cuda_graph_config":
        return
    if batch > DEFAULT_LARGEST_GRAPH:
        yield doc.problem(
            Severity.NOTE,
            "graph-below-batch",
            "cuda_graph_config.max_batch_size",
            f"batches of {DEFAULT_LARGEST_GRAPH + 1} to {batch} streams run without a CUDA graph: the "
            f"largest is {DEFAULT_LARGEST_GRAPH} unless the config names another",
            advice=f"write cuda_graph_config.max_batch_size: {batch} and enable_padding: true",
        )


def block_size_power(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Blocks hold a power of two of tokens."""
    size = doc.get("kv_cache_config.tokens_per_block")
    if not isinstance(size, int) or (size > 0 and size & (size - 1) == 0):
        return
    below = 1 << max(0, size.bit_length() - 1) if size > 0 else 32
    yield doc.problem(
        Severity.ERROR,
        "block-size-power",
        "kv_cache_config.tokens_per_block",
        f"{size} is no power of two",
        advice=f"write tokens_per_block: {below}" + (f" or {2 * below}" if size > 0 else ""),
    )


def kv_fraction(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The KV cache gets a share of the free memory that leaves room for the transceiver, and a real one."""
    key = "kv_cache_config.free_gpu_memory_fraction"
    share = doc.get(key)
    if not isinstance(share, (int, float)) or doc.role is Role.ENCODE:
        return
    if share == 0:
        yield doc.problem(
            Severity.ERROR,
            "kv-fraction",
            key,
            "0 leaves no memory for KV",
            advice=f"write {key}: 0.85",
        )
    elif share < TINY_FRACTION:
        yield doc.problem(
            Severity.WARNING,
            "kv-fraction",
            key,
            f"KV gets only {share:.1%} of the free memory",
            advice=f"write {key}: 0.85 (a fraction, no percentage)",
        )
    elif share >= HIGH_FRACTION and _has_transceiver(doc):
        yield doc.problem(
            Severity.WARNING,
            "kv-fraction",
            key,
            f"{share:g} of the free memory for KV: the transceiver's buffers and CUDA graphs come on top, "
            "and workers were seen to run out of memory",
            advice=f"write {key}: 0.85",
        )


def _prefills_whole(doc: Document) -> bool:
    """Return whether the worker computes prompts and must compute each in one step."""
    computes = doc.role in (Role.AGGREGATED, Role.PREFILL)
    return computes and doc.get("enable_chunked_prefill") is not True


def _graph_shortage(doc: Document) -> tuple[int, int, int] | None:
    """Return largest graph, drafts and the tokens both need when a step has fewer, else None."""
    drafts, sizes = draft_tokens(doc), graph_sizes(doc)
    if drafts < 1 or not sizes:
        return None
    largest = min(sizes[-1], batch_size(doc))
    needed = largest * (drafts + 1)
    return (largest, drafts, needed) if max_num_tokens(doc) < needed else None


def _has_transceiver(doc: Document) -> bool:
    has_backend = doc.get("cache_transceiver_config.backend") is not None
    return doc.role in DISAGGREGATED or has_backend


def _few(sizes: list[int]) -> str:
    shown = ", ".join(map(str, sizes[:3]))
    return shown if len(sizes) <= 3 else f"{shown} and {len(sizes) - 3} more"


DOCUMENT_RULES: tuple[DocumentRule, ...] = (
    batch_above_tokens,
    prompt_above_tokens,
    sequence_above_tokens,
    sequence_too_short,
    input_too_short,
    draft_graph_tokens,
    draft_batch_tokens,
    graph_above_batch,
    graph_below_batch,
    block_size_power,
    kv_fraction,
)

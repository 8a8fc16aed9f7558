"""Does a worker fit its GPUs, and how much KV remains? Judges the sums of budget.py."""

from __future__ import annotations

from collections.abc import Iterator

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.budget import (
    RESERVE_BYTES,
    Budget,
    expert_copies,
    memory_sum,
    model_weights,
)
from trtllm_workers.lint.rules.experts import load_balancer
from trtllm_workers.lint.rules.kv import gpu_sequence_bytes, shown_bytes
from trtllm_workers.lint.rules.model import Model
from trtllm_workers.lint.rules.rule import DocumentRule, Facts
from trtllm_workers.types import Role

_FRACTION = "kv_cache_config.free_gpu_memory_fraction"


def memory_weights(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The weights must fit, and leave memory for a step."""
    budget = memory_sum(doc, facts)
    if budget is None or budget.free > 0:
        return
    alone = budget.weights > budget.gpu
    yield doc.problem(
        Severity.ERROR if alone else Severity.WARNING,
        "memory-weights",
        "tensor_parallel_size",
        f"weights of {shown_bytes(budget.weights)} do not fit a GPU of {shown_bytes(budget.gpu)}"
        if alone
        else f"weights of {shown_bytes(budget.weights)} leave no room for KV on a GPU of "
        f"{shown_bytes(budget.gpu)}",
        advice="use more GPUs (tensor, expert or pipeline parallel), or a quantised checkpoint",
        arithmetic=budget.lines(),
    )


def memory_kv_cache(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The KV cache should hold the longest sequence, and a full batch of usual ones."""
    budget, model = memory_sum(doc, facts), facts.model
    if budget is None or model is None or budget.free <= 0:
        return
    longest, named = _longest(doc, model, facts)
    one = gpu_sequence_bytes(doc, model, longest)
    if one > budget.kv:
        yield doc.problem(
            Severity.WARNING,
            "memory-kv-cache",
            _FRACTION,
            f"the KV cache holds {budget.kv_tokens} tokens, fewer than one sequence of {longest} ({named})",
            advice=_more_kv(budget, one, f"lower max_seq_len to {budget.kv_tokens}"),
            arithmetic=(
                *budget.lines(),
                f"one sequence of {longest} tokens {shown_bytes(one)} > KV cache {shown_bytes(budget.kv)}",
            ),
        )
        return
    usual, batch = _usual(doc, facts), doc.get("max_batch_size")
    if usual is None or not isinstance(batch, int):
        return
    each = gpu_sequence_bytes(doc, model, usual)
    if each > 0 and batch * each > budget.kv:
        fit = int(budget.kv / each)
        yield doc.problem(
            Severity.WARNING,
            "memory-kv-cache",
            _FRACTION,
            f"the KV cache holds {fit} sequences of usual length ({usual} tokens), max_batch_size is {batch}",
            advice=_more_kv(budget, batch * each, f"write max_batch_size: {max(1, fit)}"),
            arithmetic=(
                *budget.lines(),
                f"{batch} × {shown_bytes(each)} = {shown_bytes(batch * each)} > "
                f"KV cache {shown_bytes(budget.kv)}",
            ),
        )


def memory_left_over(doc: Document, facts: Facts) -> Iterator[Problem]:
    """What KV leaves must hold CUDA graphs and the transceiver's buffers."""
    budget = memory_sum(doc, facts)
    if budget is None or budget.free <= 0 or budget.left_over >= 0:
        return
    proposal = budget.proposal
    yield doc.problem(
        Severity.WARNING,
        "memory-left-over",
        _FRACTION,
        f"CUDA graphs and transceiver buffers need {shown_bytes(budget.graphs + budget.buffers)}, and KV "
        f"leaves {shown_bytes(budget.free - budget.kv)}",
        advice=f"write {_FRACTION}: {proposal:g}"
        if proposal is not None
        else "use more GPUs, fewer CUDA graphs, or a smaller transceiver buffer",
        arithmetic=budget.lines(),
    )


def memory_budget(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The sum, for a worker that fits."""
    budget = memory_sum(doc, facts)
    if budget is None or any(True for rule in _COMPLAINTS for _ in rule(doc, facts)):
        return
    proposal = budget.proposal
    yield doc.problem(
        Severity.NOTE,
        "memory-budget",
        _FRACTION,
        f"KV cache of {shown_bytes(budget.kv)} on each GPU, {budget.kv_tokens} tokens"
        + (
            ""
            if proposal is None
            else f"; fractions up to {proposal:g} leave {shown_bytes(RESERVE_BYTES)} or more for the unforeseen"
        ),
        arithmetic=budget.lines(),
    )


def memory_windows(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Layers with a sliding window save KV only when the config names the window."""
    model, key = facts.model, "kv_cache_config.max_attention_window"
    if model is None or not model.windows or doc.role is Role.ENCODE or doc.get(key):
        return
    yield doc.problem(
        Severity.NOTE,
        "memory-windows",
        key,
        f"{model.windows} of {model.layers} layers look at a window only, but all keep the KV of whole "
        "sequences unless the config names the window (counted so here)",
        advice=f"write {key} as a list of tokens that repeats over the layers, if this model supports it",
    )


def memory_host(doc: Document, facts: Facts) -> Iterator[Problem]:
    """A load balancer keeps the experts in host memory as well, about twice while loading."""
    host, model = facts.context.host_memory_bytes, facts.model
    if host is None or model is None or not model.experts or not load_balancer(doc):
        return
    copy = model_weights(model).experts * expert_copies(doc, model)
    if 2 * copy <= host:
        return
    yield doc.problem(
        Severity.ERROR if copy > host else Severity.WARNING,
        "memory-host",
        "moe_config.load_balancer",
        f"loading with a load balancer takes about {shown_bytes(2 * copy)} of host memory, the node has "
        f"{shown_bytes(host)}",
        advice="remove moe_config.load_balancer, or use nodes with more memory",
        arithmetic=(
            f"all experts {shown_bytes(copy)}",
            f"2 copies × {shown_bytes(copy)} = {shown_bytes(2 * copy)} > {shown_bytes(host)}",
        ),
    )


def _longest(doc: Document, model: Model, facts: Facts) -> tuple[int, str]:
    given = doc.get("max_seq_len")
    if isinstance(given, int):
        return given, "max_seq_len"
    if facts.context.isl is not None:
        osl = 1 if doc.role is Role.PREFILL else facts.context.osl or 0
        return facts.context.isl + osl, "longest input and output"
    return model.max_positions, "the model's longest, as max_seq_len is unset"


def _usual(doc: Document, facts: Facts) -> int | None:
    """Return a running sequence's usual length: its prompt, and half of its answer."""
    isl = facts.context.isl
    if isl is None or doc.role is Role.PREFILL:
        return isl
    return isl + (facts.context.osl or 0) // 2


def _more_kv(budget: Budget, needed: float, otherwise: str) -> str:
    proposal = budget.proposal
    if proposal is not None and budget.kv_limit is None and proposal * budget.free >= needed:
        return f"write {_FRACTION}: {proposal:g}, or {otherwise}"
    return f"{otherwise}, or use more GPUs"


_COMPLAINTS: tuple[DocumentRule, ...] = (memory_weights, memory_kv_cache, memory_left_over)
DOCUMENT_RULES: tuple[DocumentRule, ...] = (
    *_COMPLAINTS,
    memory_budget,
    memory_windows,
    memory_host,
)

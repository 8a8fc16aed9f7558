"""What a rule is, and what every rule may ask. Holds no rule itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem
from trtllm_workers.lint.rules.model import Model
from trtllm_workers.types import Role

DISAGGREGATED = frozenset({Role.PREFILL, Role.DECODE})
GENERATING = frozenset({Role.AGGREGATED, Role.PREFILL, Role.DECODE})

BACKENDS = frozenset({"DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI"})
"""Backends of TensorRT-LLM's KV transceiver."""
DEFAULT_BATCH_SIZE = 2048
"""TensorRT-LLM's max_batch_size when the key is unset."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules know besides documents. ``model`` is None when its folder is unknown or unreadable."""

    context: LintContext
    model: Model | None = None


DocumentRule = Callable[[Document, Facts], Iterator[Problem]]
PairRule = Callable[[Document, Document, Facts], Iterator[Problem]]
"""The prefill document comes first, then the decode document."""
DeploymentRule = Callable[[Sequence[Document], Facts], Iterator[Problem]]


def rule_name(rule: Callable[..., Iterator[Problem]]) -> str:
    """Return a rule's stable name: its function's, in kebab-case."""
    return rule.__name__.replace("_", "-")


def number(doc: Document, key: str, default: int) -> int:
    """Return a whole number of the document, or ``default`` when neither it nor TensorRT-LLM has one."""
    value = doc.get(key)
    return value if isinstance(value, int) else default


def batch_size(doc: Document) -> int:
    """Return max_batch_size, TensorRT-LLM's own when unset."""
    return number(doc, "max_batch_size", DEFAULT_BATCH_SIZE)


def max_num_tokens(doc: Document) -> int:
    """Return the tokens that one step computes at most."""
    return number(doc, "max_num_tokens", 8192)


def whole_blocks(doc: Document, tokens: int) -> int:
    """Return the next number of tokens that is a whole number of blocks."""
    block = max(1, number(doc, "kv_cache_config.tokens_per_block", 1))
    return -(-tokens // block) * block


def switched_off(doc: Document, section: str) -> bool:
    """Return whether a section is given as null (or empty)."""
    return section in doc.values and doc.values[section] is None


def transceiver_backend(doc: Document, facts: Facts) -> str | None:
    """Return the transceiver backend that the worker will have, the launcher's part included."""
    given = doc.get("cache_transceiver_config.backend")
    if isinstance(given, str):
        return given
    explicit = switched_off(doc, "cache_transceiver_config") or doc.given(
        "cache_transceiver_config.backend"
    )
    if explicit or doc.role not in DISAGGREGATED:
        return None
    written = (facts.context.kv_transport or "").upper()
    return written if written in BACKENDS else None


def draft_tokens(doc: Document) -> int:
    """Return how many tokens speculation drafts for each stream and step; 0 without speculation."""
    if not doc.has_section("speculative_config"):
        return 0
    if doc.get("speculative_config.decoding_type") == "MTP":
        return number(doc, "speculative_config.num_nextn_predict_layers", 1)
    return number(doc, "speculative_config.max_draft_len", 0)


def draft_key(doc: Document) -> str:
    """Return the key that ``draft_tokens`` came from."""
    if doc.get("speculative_config.decoding_type") == "MTP":
        return "num_nextn_predict_layers"
    return "max_draft_len"


@dataclass(frozen=True, slots=True)
class Parallel:
    """How a worker's GPUs share the model. ``moe_tp`` × ``ep`` = ``tp`` once both are known."""

    tp: int
    pp: int
    cp: int
    ep: int
    moe_tp: int
    attention_dp: bool

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp

    @property
    def attention_tp(self) -> int:
        """Return over how many GPUs the attention heads of one request are divided."""
        return 1 if self.attention_dp else self.tp


def parallel(doc: Document) -> Parallel:
    """Return the parallel sizes of a document, with what TensorRT-LLM infers from the others."""
    tp = max(1, number(doc, "tensor_parallel_size", 1))
    ep = number(doc, "moe_expert_parallel_size", -1)
    moe_tp = number(doc, "moe_tensor_parallel_size", -1)
    cluster = max(1, number(doc, "moe_cluster_parallel_size", -1))
    if ep < 1:
        ep = max(1, tp // (moe_tp * cluster)) if moe_tp >= 1 else 1
    if moe_tp < 1:
        moe_tp = max(1, tp // (ep * cluster))
    return Parallel(
        tp=tp,
        pp=max(1, number(doc, "pipeline_parallel_size", 1)),
        cp=max(1, number(doc, "context_parallel_size", 1)),
        ep=ep,
        moe_tp=moe_tp,
        attention_dp=doc.get("enable_attention_dp") is True,
    )

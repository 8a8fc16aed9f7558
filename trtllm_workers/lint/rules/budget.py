"""One GPU's memory, item by item. Adds up; what is too much is for the rules in memory.py to say.

Weights, KV and the transceiver's buffer follow from the model's shape. Three items are estimates, named
as such wherever they are shown: RUNTIME_BYTES, activations, and CUDA graphs. They were chosen to be
rather too large than too small; a measured start is worth more than they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.rules.experts import load_balancer
from trtllm_workers.lint.rules.graphs import captured_sizes
from trtllm_workers.lint.rules.kv import gpu_kv_bytes_per_token, gpu_layers, shown_bytes
from trtllm_workers.lint.rules.model import Model, read_model
from trtllm_workers.lint.rules.rule import (
    DISAGGREGATED,
    Facts,
    batch_size,
    draft_tokens,
    max_num_tokens,
    parallel,
)
from trtllm_workers.lint.rules.variables import (
    BUFFER_SIZE,
    DEFAULT_BUFFER_BYTES,
    parse_size,
    worker_variables,
)
from trtllm_workers.types import Role

RUNTIME_BYTES = 2 << 30
"""Estimate: CUDA context, loaded kernels, NCCL's channels, workspaces of the libraries."""
GRAPH_LAYER_BYTES = 256 << 10
"""Estimate: what capturing one layer at one batch size takes."""
HIDDEN_COPIES, INTERMEDIATE_COPIES = 6, 3
"""Estimate: vectors of either width that are alive for a token at the worst moment of a layer."""
ACTIVATION_BYTES, LOGIT_BYTES = 2, 4
"""Activations are 16-bit, logits 32-bit."""
RESERVE_BYTES = 1 << 30
"""What a proposed fraction leaves besides all items, for fragmentation and for errors of the estimates."""


LARGEST_PROPOSAL = 0.94
"""No larger fraction is proposed: from the next on, workers with a transceiver ran out of memory."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a whole model by how GPUs share them. ``stored``: scaled to the checkpoint's real size."""

    attention: float
    dense: float
    experts: float
    embeddings: float
    stored: bool

    @property
    def total(self) -> float:
        return self.attention + self.dense + self.experts + self.embeddings


def model_weights(model: Model) -> Weights:
    """Return a model's weights by kind; the checkpoint's size, where known, corrects their sum."""
    kinds = (
        model.attention_parameters * model.weight_bytes,
        model.dense_parameters * model.weight_bytes,
        model.expert_parameters * model.weight_bytes,
        model.embedding_parameters * model.element_bytes,
    )
    if model.stored_bytes is None or not sum(kinds):
        return Weights(*kinds, stored=False)
    scale = model.stored_bytes / sum(kinds)
    attention, dense, experts, embeddings = (kind * scale for kind in kinds)
    return Weights(attention, dense, experts, embeddings, stored=True)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes on one GPU, the fullest one of a worker.

    ``free`` is what TensorRT-LLM finds free once the model is loaded and has run once; it takes
    ``fraction`` of it for KV. ``graphs`` and ``buffers`` come afterwards, out of the rest.
    """

    gpu: int
    weights: float
    activations: float
    graphs: float
    graph_count: int
    buffers: float
    buffer_reason: str
    fraction: float
    kv_limit: float | None
    kv_token: float
    weight_lines: tuple[str, ...]

    @property
    def free(self) -> float:
        return self.gpu - self.weights - RUNTIME_BYTES - self.activations

    @property
    def kv(self) -> float:
        share = max(0.0, self.free * self.fraction)
        return share if self.kv_limit is None else min(share, self.kv_limit)

    @property
    def left_over(self) -> float:
        return self.free - self.kv - self.graphs - self.buffers

    @property
    def kv_tokens(self) -> int:
        return int(self.kv / self.kv_token) if self.kv_token else 0

    @property
    def proposal(self) -> float | None:
        """Return a fraction that leaves room for everything else, None when there is none."""
        room = self.free - self.graphs - self.buffers - RESERVE_BYTES
        if self.free <= 0 or room <= 0:
            return None
        fraction = min(LARGEST_PROPOSAL, int(100 * room / self.free) / 100)
        return fraction if fraction > 0 else None

    def lines(self) -> tuple[str, ...]:
        """Return the whole sum, a line for each item."""
        loaded = (
            *self.weight_lines,
            f"GPU memory {shown_bytes(self.gpu)}",
            f"- weights {shown_bytes(self.weights)}",
            f"- runtime {shown_bytes(RUNTIME_BYTES)} (estimate)",
            f"- activations {shown_bytes(self.activations)} (estimate)",
            f"= free {_signed(self.free)}",
        )
        if self.free <= 0:
            return loaded
        limited = self.kv_limit is not None and self.kv_limit < self.free * self.fraction
        share = f"{self.fraction:g} × {shown_bytes(self.free)}"
        return (
            *loaded,
            f"- KV cache {shown_bytes(self.kv)} ({'limited by the config' if limited else share}): "
            f"{self.kv_tokens} tokens of {self.kv_token:.0f} bytes",
            f"- CUDA graphs {shown_bytes(self.graphs)} (estimate, {self.graph_count} sizes)",
            f"- transceiver buffers {shown_bytes(self.buffers)} ({self.buffer_reason})",
            f"= left over {_signed(self.left_over)}",
        )


def memory_sum(doc: Document, facts: Facts) -> Budget | None:
    """Return the memory of one GPU of a worker; None when GPU or model are unknown, or for encoders."""
    gpu, model = facts.context.gpu_memory_bytes, facts.model
    fraction = doc.get("kv_cache_config.free_gpu_memory_fraction")
    if gpu is None or model is None or doc.role is Role.ENCODE:
        return None
    if not model.layers or not model.hidden or not isinstance(fraction, (int, float)):
        return None
    weights, lines = _gpu_weights(doc, model)
    sizes = captured_sizes(doc)
    buffers, reason = _buffers(doc, model, facts)
    return Budget(
        gpu=gpu,
        weights=weights,
        activations=_activations(doc, model),
        graphs=len(sizes) * gpu_layers(doc, model) * GRAPH_LAYER_BYTES,
        graph_count=len(sizes),
        buffers=buffers,
        buffer_reason=reason,
        fraction=fraction,
        kv_limit=_kv_limit(doc, model),
        kv_token=gpu_kv_bytes_per_token(doc, model),
        weight_lines=lines,
    )


def expert_copies(doc: Document, model: Model) -> float:
    """Return how many times the experts' weights are kept: more than once with spare slots."""
    slots = load_balancer(doc).get("num_slots")
    if not isinstance(slots, int) or not model.experts:
        return 1.0
    return max(1.0, slots / model.experts)


def _gpu_weights(doc: Document, model: Model) -> tuple[float, tuple[str, ...]]:
    whole, sizes = model_weights(model), parallel(doc)
    stage = min(1.0, gpu_layers(doc, model) / model.layers)
    copies = expert_copies(doc, model)
    # Embedding and output head lie on the first and last stage: the fullest GPU may have either.
    shares = {
        "attention": whole.attention * stage / sizes.attention_tp,
        "dense layers": whole.dense * stage / sizes.tp,
        "experts": whole.experts * stage * copies / sizes.tp,
        "embeddings": whole.embeddings / sizes.attention_tp / min(2, sizes.pp),
    }
    drafter, drafter_line = _drafter(doc, sizes.tp)
    origin = "as stored" if whole.stored else "computed from config.json"
    split = f"TP {sizes.tp}, PP {sizes.pp}, EP {sizes.ep}"
    if sizes.attention_dp:
        split += ", attention on every GPU"
    parts = ", ".join(f"{name} {shown_bytes(size)}" for name, size in shares.items() if size)
    lines = [f"weights of the model {shown_bytes(whole.total)} ({origin})"]
    if copies > 1:
        lines.append(f"experts × {copies:.2f} for the load balancer's spare slots")
    lines.append(f"one GPU of {split}: {parts}{drafter_line}")
    return sum(shares.values()) + drafter, tuple(lines)


def _drafter(doc: Document, tp: int) -> tuple[float, str]:
    named = doc.get("speculative_config.speculative_model") or doc.get(
        "speculative_config.speculative_model_dir"
    )
    if not named:
        return 0.0, ""
    try:
        size = model_weights(read_model(Path(str(named)))).total / tp
    except ConfigError:
        return 0.0, ", draft model not counted (its folder is not at hand)"
    return size, f", draft model {shown_bytes(size)}"


def _activations(doc: Document, model: Model) -> float:
    sizes, tokens = parallel(doc), max_num_tokens(doc)
    # With attention data parallelism the experts see the tokens of all ranks at once.
    experts = float(model.experts_per_token * model.expert_intermediate)
    if not sizes.attention_dp:
        experts /= sizes.tp
    widest = max(model.intermediate / sizes.tp, experts)
    layer = (
        tokens * ACTIVATION_BYTES * (HIDDEN_COPIES * model.hidden + INTERMEDIATE_COPIES * widest)
    )
    rows = min(tokens, batch_size(doc) * (draft_tokens(doc) + 1))
    return layer + rows * model.vocab * LOGIT_BYTES


def _kv_limit(doc: Document, model: Model) -> float | None:
    limits = []
    if tokens := doc.get("kv_cache_config.max_tokens"):
        limits.append(tokens * gpu_kv_bytes_per_token(doc, model))
    if total := doc.get("kv_cache_config.max_gpu_total_bytes"):
        limits.append(float(total))
    return min(limits) if limits else None


def _buffers(doc: Document, model: Model, facts: Facts) -> tuple[float, str]:
    """Return the transceiver's buffers: one for what comes in, one or more for what goes out."""
    if doc.role not in DISAGGREGATED:
        return 0.0, f"role {doc.role}"
    variables = worker_variables(doc, facts.context.environ)
    sends = variables.get("TRTLLM_KVCACHE_SEND_MAX_CONCURRENCY_NUM", "1")
    outgoing = max(1, int(sends)) if sends.isdecimal() else 1
    count = f"{outgoing} out and 1 in, each of"
    if tokens := doc.get("cache_transceiver_config.max_tokens_in_buffer"):
        size = tokens * gpu_kv_bytes_per_token(doc, model)
        return (outgoing + 1) * size, f"{count} max_tokens_in_buffer {tokens}"
    given = parse_size(variables.get(BUFFER_SIZE, ""))
    size = given or DEFAULT_BUFFER_BYTES
    default = "" if given else "'s default"
    return float((outgoing + 1) * size), f"{count} {BUFFER_SIZE}{default} {shown_bytes(size)}"


def _signed(count: float) -> str:
    return shown_bytes(count) if count >= 0 else f"-{shown_bytes(-count)}"

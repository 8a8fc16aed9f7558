"""How many bytes a token's KV takes, on one GPU and in all. Knows no free memory."""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.rules.model import DTYPE_BYTES, Model
from trtllm_workers.lint.rules.rule import draft_tokens, parallel


def shown_bytes(count: float) -> str:
    """Return bytes as people read them, in powers of 1024."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def kv_dtype(doc: Document, model: Model) -> str:
    """Return the dtype of KV: the config's, else the checkpoint's, else the model's own."""
    given = doc.get("kv_cache_config.dtype")
    if isinstance(given, str) and given != "auto":
        return given
    if model.kv_dtype in DTYPE_BYTES:
        return model.kv_dtype
    engine = doc.get("dtype")
    return engine if isinstance(engine, str) and engine != "auto" else model.dtype


def layer_bytes(doc: Document, model: Model, *, heads: int | None = None) -> float:
    """Return the KV bytes of one token in one layer; ``heads``: only so many KV heads of it."""
    size = DTYPE_BYTES.get(kv_dtype(doc, model), 2)
    if model.mla:  # one latent vector for all heads, so nothing to divide
        return model.latent_width * size
    return 2 * (model.kv_heads if heads is None else heads) * model.head_dim * size


def kv_layers(doc: Document, model: Model) -> int:
    """Return the layers with KV of the whole model, drafting MTP layers included."""
    return model.layers - model.recurrent + _drafting_layers(doc, model)


def gpu_layers(doc: Document, model: Model) -> int:
    """Return the layers of the fullest pipeline stage, drafting MTP layers included."""
    stages, drafting = parallel(doc).pp, _drafting_layers(doc, model)
    partition = doc.get("pp_partition")
    if stages > 1 and isinstance(partition, list) and partition:
        return int(max(partition)) + drafting
    return -(-(model.layers + drafting) // stages)


def gpu_kv_layers(doc: Document, model: Model) -> int:
    """Return the layers with KV of the fullest stage; recurrent layers are spread evenly."""
    every = model.layers + _drafting_layers(doc, model)
    return -(-gpu_layers(doc, model) * kv_layers(doc, model) // max(1, every))


def _drafting_layers(doc: Document, model: Model) -> int:
    mtp = doc.get("speculative_config.decoding_type") == "MTP" and draft_tokens(doc) > 0
    return max(1, model.draft_layers) if mtp else 0


def gpu_kv_heads(doc: Document, model: Model) -> int:
    """Return one GPU's KV heads: divided by tensor parallelism, at least one, all under attention DP."""
    return max(1, -(-model.kv_heads // parallel(doc).attention_tp))


def gpu_layer_bytes(doc: Document, model: Model) -> float:
    """Return the KV bytes of one token in one layer on one GPU."""
    return layer_bytes(doc, model, heads=gpu_kv_heads(doc, model))


def kv_bytes_per_token(doc: Document, model: Model) -> float:
    """Return the KV bytes of one token over all layers and heads: what a handoff moves."""
    return kv_layers(doc, model) * layer_bytes(doc, model)


def gpu_kv_bytes_per_token(doc: Document, model: Model) -> float:
    """Return the KV bytes of one token on one GPU."""
    return gpu_kv_layers(doc, model) * gpu_layer_bytes(doc, model)


def gpu_sequence_bytes(doc: Document, model: Model, tokens: int) -> float:
    """Return one GPU's KV bytes of a sequence; layers with an attention window keep only that much.

    A window counts only when the config names it: TensorRT-LLM keeps the whole sequence otherwise.
    """
    layers = gpu_kv_layers(doc, model)
    windows: Sequence[int] = doc.get("kv_cache_config.max_attention_window") or (tokens,)
    kept = sum(min(tokens, windows[index % len(windows)]) for index in range(layers))
    return kept * gpu_layer_bytes(doc, model)

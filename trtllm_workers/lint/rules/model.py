"""A model's shape and size from its folder: config.json and file sizes. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_workers.config.hf_model import read_hf_model

# Bytes of one stored weight with the scales that lie beside it. NVFP4: 4 bits and an 8-bit scale for
# every 16 weights; MXFP4: for every 32; AWQ and GPTQ: 4 bits and a 16-bit scale and zero for every 128.
WEIGHT_BYTES: Mapping[str, float] = {
    "fp8": 1.0,
    "int8": 1.0,
    "nvfp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 32,
    "int4": 0.5 + 4 / 128,
}
DTYPE_BYTES: Mapping[str, float] = {
    "float32": 4,
    "float": 4,
    "float16": 2,
    "half": 2,
    "bfloat16": 2,
    "fp8": 1,
    "float8_e4m3fn": 1,
    "int8": 1,
    # 4 bits and an 8-bit scale for every 16 values.
    "nvfp4": 0.5 + 1 / 16,
}


@dataclass(frozen=True, slots=True)
class Model:
    """Architecture facts; sizes are in elements unless the name says bytes.

    ``latent_width`` is kv_lora_rank + qk_rope_head_dim of a multi-head latent attention (MLA) model and
    0 otherwise. ``experts`` is 0 for a dense model, ``moe_layers`` counts the layers that have them.
    ``draft_layers`` are the multi-token-prediction layers that came with the checkpoint. ``windows``
    counts layers with a sliding attention window, ``recurrent`` those that keep a state and no KV. ``quantization`` is a key of WEIGHT_BYTES, or "".
    ``stored_bytes`` is the size of the checkpoint's weights, None when no file tells.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    tied_embeddings: bool
    dtype: str
    quantization: str
    kv_dtype: str
    latent_width: int
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    experts: int
    experts_per_token: int
    shared_intermediate: int
    expert_intermediate: int
    moe_layers: int
    draft_layers: int
    windows: int
    recurrent: int
    stored_bytes: int | None

    @property
    def mla(self) -> bool:
        return self.latent_width > 0

    @property
    def weight_bytes(self) -> float:
        """Return the bytes of one weight of a linear layer."""
        return WEIGHT_BYTES.get(self.quantization, self.element_bytes)

    @property
    def element_bytes(self) -> float:
        """Return the bytes of one element that is not quantised."""
        return DTYPE_BYTES.get(self.dtype, 2)

    @property
    def attention_parameters(self) -> int:
        """Return the attention weights of all layers."""
        if self.mla:
            query_width = self.heads * (self.nope_dim + self.rope_dim)
            if self.q_rank:
                query = self.hidden * self.q_rank + self.q_rank * query_width
            else:
                query = self.hidden * query_width
            down = self.hidden * self.latent_width
            up = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
            out = self.heads * self.value_dim * self.hidden
            return self.layers * (query + down + up + out)
        width = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * width

    @property
    def expert_parameters(self) -> int:
        """Return the routed experts' weights of all layers: gate, up and down each."""
        return self.moe_layers * self.experts * 3 * self.hidden * self.expert_intermediate

    @property
    def dense_parameters(self) -> int:
        """Return the other feed-forward weights: dense layers, shared experts, expert routers."""
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.intermediate
        shared = 3 * self.hidden * self.shared_intermediate
        return dense + self.moe_layers * (shared + self.hidden * self.experts)

    @property
    def embedding_parameters(self) -> int:
        """Return the token embedding's weights, and the output head's when it has its own."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)


def read_model(folder: Path) -> Model:
    """Read a model folder. Raises ConfigError when config.json is missing, broken or lacks its sizes."""
    hf = read_hf_model(folder)
    text = hf.text
    heads = _whole(text, "num_attention_heads", "n_head")
    hidden = _whole(text, "hidden_size", "n_embd")
    layers = _whole(text, "num_hidden_layers", "n_layer")
    kv_rank = _whole(text, "kv_lora_rank")
    rope_dim = _whole(text, "qk_rope_head_dim")
    experts = _whole(text, "n_routed_experts", "num_local_experts", "num_experts")
    intermediate = (
        _whole(text, "intermediate_size_mlp", "intermediate_size", "n_inner") or 4 * hidden
    )
    quantization, kv_dtype = _quantization(folder, text)
    return Model(
        kind=str(text.get("model_type", "")),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_whole(text, "num_key_value_heads") or heads,
        head_dim=_whole(text, "head_dim") or (hidden // heads if heads else 0),
        intermediate=intermediate,
        vocab=hf.vocab_size,
        max_positions=hf.max_positions,
        tied_embeddings=text.get("tie_word_embeddings") is True,
        dtype=str(text.get("torch_dtype") or text.get("dtype") or "bfloat16"),
        quantization=quantization,
        kv_dtype=kv_dtype,
        latent_width=kv_rank + rope_dim if kv_rank else 0,
        q_rank=_whole(text, "q_lora_rank"),
        kv_rank=kv_rank,
        nope_dim=_whole(text, "qk_nope_head_dim"),
        rope_dim=rope_dim,
        value_dim=_whole(text, "v_head_dim"),
        experts=experts,
        experts_per_token=_whole(text, "num_experts_per_tok", "experts_per_token"),
        shared_intermediate=_shared_intermediate(text),
        expert_intermediate=_whole(text, "moe_intermediate_size", "intermediate_size"),
        moe_layers=_moe_layers(text, layers) if experts else 0,
        draft_layers=_whole(text, "num_nextn_predict_layers", "mtp_num_hidden_layers"),
        windows=_windowed_layers(text, layers),
        recurrent=_recurrent_layers(text, layers),
        stored_bytes=_stored_bytes(folder),
    )


def _whole(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return 0


def _shared_intermediate(text: Mapping[str, Any]) -> int:
    """Return the width of the experts that every token passes through, all together."""
    named = _whole(text, "shared_expert_intermediate_size")
    if named:
        return named
    count = _whole(text, "n_shared_experts")
    if not count and str(text.get("model_type", "")).startswith("llama4"):
        count = 1  # Llama 4 has one in each layer of experts and does not say so
    return count * _whole(text, "moe_intermediate_size", "intermediate_size")


def _moe_layers(text: Mapping[str, Any], layers: int) -> int:
    named = text.get("moe_layers")
    if isinstance(named, list):
        return len(named)
    dense = _whole(text, "first_k_dense_replace")
    step = _whole(text, "interleave_moe_layer_step", "moe_layer_freq", "decoder_sparse_step") or 1
    only_dense = text.get("mlp_only_layers")
    return max(
        0, (layers - dense) // step - (len(only_dense) if isinstance(only_dense, list) else 0)
    )


def _windowed_layers(text: Mapping[str, Any], layers: int) -> int:
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    if not _whole(text, "sliding_window") or text.get("use_sliding_window") is False:
        return 0
    pattern = _whole(text, "sliding_window_pattern")
    return layers - layers // pattern if pattern else layers


def _recurrent_layers(text: Mapping[str, Any], layers: int) -> int:
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind in ("linear_attention", "mamba", "recurrent") for kind in kinds)
    interval = _whole(text, "full_attention_interval")
    return layers - layers // interval if interval else 0


def _quantization(folder: Path, text: Mapping[str, Any]) -> tuple[str, str]:
    """Return how weights are stored and which KV dtype the checkpoint asks for ("" twice: as it is)."""
    own = _json(folder / "hf_quant_config.json").get("quantization")
    described = own if isinstance(own, dict) else text.get("quantization_config")
    if not isinstance(described, dict):
        return "", ""
    words = " ".join(
        str(described.get(key, "")) for key in ("quant_algo", "quant_method", "format")
    ).lower()
    kv = str(described.get("kv_cache_quant_algo") or "").lower()
    bits = described.get("bits")
    for mark, stored in (
        ("nvfp4", "nvfp4"),
        ("mxfp4", "mxfp4"),
        ("fp8", "fp8"),
        ("float-quantized", "fp8"),
        ("int8", "int8"),
        ("w8a8", "int8"),
        ("awq", "int4"),
        ("gptq", "int4"),
        ("w4a", "int4"),
    ):
        if mark in words:
            return ("int8" if stored == "int4" and bits == 8 else stored), kv
    return "", kv


def _stored_bytes(folder: Path) -> int | None:
    index = _json(folder / "model.safetensors.index.json").get("metadata")
    if isinstance(index, dict) and type(index.get("total_size")) is int and index["total_size"] > 0:
        return int(index["total_size"])
    try:
        # Mistral's consolidated.safetensors repeats what the model-*.safetensors hold.
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        return sum(file.stat().st_size for file in files) or None
    except OSError:
        return None


def _json(path: Path) -> Mapping[str, Any]:
    """Return a JSON object of a file, empty when there is none: these files only refine an estimate."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

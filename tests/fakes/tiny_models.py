"""Makes tiny random-weight Hugging Face folders for tests. Knows no tokenizer and no engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
}


def make_tiny_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = 512,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate_size: int = 128,
    max_position_embeddings: int = 2048,
    tie_word_embeddings: bool = False,
    sliding_window: int | None = None,
    dtype: str = "float32",
    eos_token_id: int | list[int] | None = 1,
    num_shards: int = 1,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Write config.json, generation_config.json and random weights to ``path`` and return it.

    The same arguments give the same bytes. ``extra_config`` is merged into config.json last
    (``rope_parameters``, ``attention_bias``, …). ``num_shards`` > 1 writes an index file.
    Raises KeyError for an unknown family.
    """
    head_dim = head_dim or hidden_size // num_heads
    config: dict[str, Any] = {
        **FAMILIES[family],
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tie_word_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": eos_token_id,
    }
    if family in ("mistral", "qwen2", "qwen3"):
        config["sliding_window"] = sliding_window
    if family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = sliding_window is not None
        config["max_window_layers"] = 0
    config.update(extra_config or {})
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_token_id}))
    _write_weights(path, _random_weights(config, family, seed), num_shards)
    return path


def _random_weights(config: dict[str, Any], family: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    inner = config["intermediate_size"]
    attention_bias = family == "qwen2" or bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    weights: dict[str, torch.Tensor] = {}

    def normal(name: str, *shape: int, scale: float = 1.0) -> None:
        weights[name] = (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def linear(name: str, rows: int, columns: int, *, bias: bool = False) -> None:
        normal(f"{name}.weight", rows, columns, scale=1.5 / math.sqrt(columns))
        if bias:
            normal(f"{name}.bias", rows, scale=0.3)

    def norm(name: str, size: int) -> None:
        weights[f"{name}.weight"] = (1 + 0.1 * torch.randn(size, generator=generator)).to(dtype)

    normal("model.embed_tokens.weight", config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        linear(f"{layer}.self_attn.q_proj", q_size, hidden, bias=attention_bias)
        linear(f"{layer}.self_attn.k_proj", kv_size, hidden, bias=attention_bias)
        linear(f"{layer}.self_attn.v_proj", kv_size, hidden, bias=attention_bias)
        # Qwen2 has no bias here though its q, k and v have one.
        linear(
            f"{layer}.self_attn.o_proj", hidden, q_size, bias=attention_bias and family != "qwen2"
        )
        if family == "qwen3":
            norm(f"{layer}.self_attn.q_norm", head_dim)
            norm(f"{layer}.self_attn.k_norm", head_dim)
        linear(f"{layer}.mlp.gate_proj", inner, hidden, bias=mlp_bias)
        linear(f"{layer}.mlp.up_proj", inner, hidden, bias=mlp_bias)
        linear(f"{layer}.mlp.down_proj", hidden, inner, bias=mlp_bias)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        linear("lm_head", config["vocab_size"], hidden)
    return weights


def _write_weights(path: Path, weights: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))

"""What a Hugging Face folder says about its model, as values. Reads config files, no weights.

Four families share one decoder: Llama, Qwen2 (bias on q, k, v), Qwen3 (norms on q and k) and
Mistral (sliding window). Models of images and text have one of them as their text part
(``vl_config.py``). Anything else is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_workers.config.vision_model import VisionModel, read_vision
from trtllm_workers.engines.torch.vl_config import VISION_FAMILIES, text_part, vision_family
from trtllm_workers.errors import ConfigError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}
_MISTRAL_WINDOW = 4096  # what a Mistral config that does not mention it means
ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
_MROPE = ("mrope", "default")  # "mrope" in older configs; what makes it so are its sections


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: base, kind and the kind's own factors.

    With ``sections`` a position has three numbers (time, height, width): the first so many pairs turn
    with the first number, and so on, around again if there are more sections.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    sections: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's shape. ``windows`` has one entry per layer: tokens seen, or None for all.

    ``vision`` is what it knows of images; None: it takes text only.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tied_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    vision: VisionModel | None = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


def read_model_config(folder: Path) -> ModelConfig:
    """Read config.json and, if present, generation_config.json.

    Raises ConfigError naming the folder, the file and the key at fault.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    if raw is None:
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise _error(f"model folder {folder} {what}; give the folder of a Hugging Face checkpoint")
    generation = _read_json(folder / "generation_config.json") or {}
    quantized = raw.get("quantization_config")
    eyes, vision = vision_family(raw), None
    if eyes is None:
        family = _family(path, raw)
    else:
        model_type = raw.get("model_type")
        raw, family = text_part(path, raw, eyes)
        vision = read_vision(folder)
        if vision is None or vision.family != eyes:
            raise _error(
                f"{path}: 'architectures' names a model of family {eyes}, but 'model_type' is "
                f"{model_type!r}"
            )
    if quantized or raw.get("quantization_config"):
        raise _error(f"{path}: quantized checkpoints (quantization_config) are not supported")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _error(f"{path}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    num_heads = _positive(path, raw, "num_attention_heads")
    num_kv_heads = _positive(path, raw, "num_key_value_heads", num_heads)
    hidden_size = _positive(path, raw, "hidden_size")
    head_dim = _positive(
        path, raw, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads
    )
    if num_heads % num_kv_heads or head_dim % 2:
        raise _error(
            f"{path}: {num_heads} attention heads over {num_kv_heads} key-value heads of {head_dim} "
            "do not fit; heads must be a multiple of key-value heads, head_dim even"
        )
    num_layers = _positive(path, raw, "num_hidden_layers")
    max_positions = _positive(path, raw, "max_position_embeddings", 2048)
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=_positive(path, raw, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_positive(path, raw, "intermediate_size"),
        max_positions=max_positions,
        norm_eps=_number(path, raw, "rms_norm_eps", 1e-6),
        rope=_rope(path, raw, max_positions, head_dim if vision and vision.uses_grid else None),
        windows=_windows(path, raw, family, num_layers),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family != "mistral" and attention_bias),
        o_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        eos_token_ids=_ids(generation.get("eos_token_id")) or _ids(raw.get("eos_token_id")),
        vision=vision,
    )


def _error(message: str) -> ConfigError:
    return ConfigError(message, param="model_path")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise _error(f"{path}:{error.lineno}: no JSON: {error.msg}; is it cut short?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _error(f"{path}: holds no JSON object")
    return content


def _family(path: Path, raw: Mapping[str, Any]) -> str:
    architectures = raw.get("architectures")
    found = architectures if isinstance(architectures, list) else [architectures]
    for name in found:
        if name in FAMILIES:
            return FAMILIES[name]
    shown = ", ".join(map(str, found)) if architectures else "no architecture"
    raise _error(
        f"{path}: names {shown} under 'architectures'; "
        f"the torch engine serves {', '.join((*FAMILIES, *VISION_FAMILIES))}"
    )


def _positive(path: Path, raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _error(f"{path}: '{key}' must be a positive whole number, not {value!r}")
    return value


def _number(path: Path, raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _error(f"{path}: '{key}' must be a positive number, not {value!r}")
    return float(value)


def _rope(
    path: Path, raw: Mapping[str, Any], max_positions: int, mrope_dim: int | None
) -> RopeConfig:
    # transformers 5 writes rope_parameters with the base inside, older ones rope_scaling beside it.
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise _error(f"{path}: 'rope_scaling' must be an object, not {scaling!r}")
    theta = _number(path, {"rope_theta": 10_000.0, **raw, **scaling}, "rope_theta", 10_000.0)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if mrope_dim is not None:
        return _mrope(path, scaling, theta, kind, mrope_dim)
    if kind not in ROPE_TYPES:
        raise _error(f"{path}: rope type '{kind}' is not supported; {', '.join(ROPE_TYPES)} are")
    if kind == "default":
        return RopeConfig(theta)
    factor = _number(path, scaling, "factor", 1.0)
    if kind != "llama3":
        return RopeConfig(theta, kind, factor, original_max_positions=max_positions)
    return RopeConfig(
        theta,
        kind,
        factor,
        _number(path, scaling, "low_freq_factor", 1.0),
        _number(path, scaling, "high_freq_factor", 4.0),
        _positive(path, scaling, "original_max_position_embeddings", max_positions),
    )


def _mrope(
    path: Path, scaling: Mapping[str, Any], theta: float, kind: str, head_dim: int
) -> RopeConfig:
    if kind not in _MROPE:
        raise _error(
            f"{path}: rope type '{kind}' is not supported for a model whose positions are in space; "
            f"{', '.join(_MROPE)} are"
        )
    sections = scaling.get("mrope_section")
    if (
        not isinstance(sections, list)
        or not all(type(size) is int and size > 0 for size in sections)
        or sum(sections) * 2 != head_dim
    ):
        raise _error(
            f"{path}: 'mrope_section' must be a list of sizes that add up to half of head_dim "
            f"({head_dim // 2}), not {sections!r}"
        )
    return RopeConfig(theta, sections=tuple(sections))


def _windows(
    path: Path, raw: Mapping[str, Any], family: str, num_layers: int
) -> tuple[int | None, ...]:
    everything: tuple[int | None, ...] = (None,) * num_layers
    if family == "llama":
        return everything
    if family == "mistral":
        raw = {"sliding_window": _MISTRAL_WINDOW, **raw}
    elif not raw.get("use_sliding_window"):
        return everything
    if raw.get("sliding_window") is None:
        return everything
    window = _positive(path, raw, "sliding_window")
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = 0 if family == "mistral" else int(raw.get("max_window_layers", 28))
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if type(item) is int and item >= 0)

"""What a folder of a model of images and text says about its text part. Knows no tower and no file.

Old checkpoints keep the text part's settings beside everything else, newer ones under ``text_config``;
both may leave out what equals the family's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_workers.errors import ConfigError

VISION_FAMILIES = {
    "LlavaForConditionalGeneration": "llava",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
}
# What the names of the text part's weights may begin with; ``model.`` alone is old Qwen's.
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")

_LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
# What a text part's config that does not say otherwise means (transformers' defaults), by model_type.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {
        **_LLAMA,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        **_LLAMA,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
}
_QWEN_VL = {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}


def vision_family(raw: Mapping[str, Any]) -> str | None:
    """Return the family of a model of images and text; None for any other."""
    architectures = raw.get("architectures")
    found = architectures if isinstance(architectures, list) else [architectures]
    return next((VISION_FAMILIES[name] for name in found if name in VISION_FAMILIES), None)


def text_part(path: Path, raw: Mapping[str, Any], family: str) -> tuple[dict[str, Any], str]:
    """Return the text part's settings, as a config.json of its own would have them, and its family."""
    nested = raw.get("text_config")
    if nested is not None and not isinstance(nested, dict):
        raise _error(f"{path}: 'text_config' must be an object, not {nested!r}")
    if family != "llava":
        if not nested and "hidden_size" not in raw:
            raise _error(f"{path}: neither has 'text_config' nor the text part's own settings")
        text = {**_QWEN_VL, **(nested or {key: raw[key] for key in raw if key != "vision_config"})}
        kind = "qwen2"
    else:
        kind = str((nested or {}).get("model_type", "llama"))
        if kind not in _DEFAULTS:
            raise _error(
                f"{path}: a LLaVA model with a text part of type '{kind}' is not supported; "
                f"{', '.join(_DEFAULTS)} are"
            )
        text = {**_DEFAULTS[kind], **(nested or {})}
    key = "tie_word_embeddings"
    text[key] = bool(raw.get(key)) or bool(text.get(key))
    for key in ("dtype", "torch_dtype", "eos_token_id"):
        if text.get(key) is None:
            text[key] = raw.get(key)
    return text, kind


def _error(message: str) -> ConfigError:
    return ConfigError(message, param="model_path")

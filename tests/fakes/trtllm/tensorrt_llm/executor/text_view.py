"""The language model of a vision-language checkpoint as a folder of its own, for the engine below."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

_TEXT_TYPES = {"qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_vl_text": "qwen2"}
_TEXT_TYPES["qwen2_5_vl_text"] = "qwen2"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def text_view(model: Path) -> tempfile.TemporaryDirectory[str]:
    """Write config.json and weights of the language model alone; positions in space become plain ones."""
    config = json.loads((model / "config.json").read_text())
    text: dict[str, Any] = {**config, **(config.get("text_config") or {})}
    for name in ("text_config", "vision_config", "rope_scaling", "layer_types"):
        text.pop(name, None)
    parameters = text.pop("rope_parameters", None) or {}
    text["rope_theta"] = parameters.get("rope_theta", text.get("rope_theta", 10000.0))
    text["model_type"] = _TEXT_TYPES.get(text["model_type"], text["model_type"])
    text["architectures"] = [_ARCHITECTURES[text["model_type"]]]
    weights = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            plain = name
            for prefix, instead in _PREFIXES:
                if name.startswith(prefix):
                    plain = instead + name.removeprefix(prefix)
            if plain.startswith(("model.embed", "model.layers", "model.norm", "lm_head")):
                weights[plain] = tensor
    folder = tempfile.TemporaryDirectory(prefix="fake-trtllm-")
    (Path(folder.name) / "config.json").write_text(json.dumps(text))
    generation = model / "generation_config.json"
    if generation.exists():
        (Path(folder.name) / generation.name).write_text(generation.read_text())
    save_file(weights, Path(folder.name) / "model.safetensors")
    return folder

# ruff: noqa: T201  (a script tells what it wrote on the terminal)
"""Writes tiny models of images and text: random weights, the demo model's tokenizer, a real layout.

    python -m trtllm_workers.demo.vision --family qwen2_vl --out /tmp/tiny-qwen

They say nothing of sense, but what they say depends on the images, so everything that serves such models
can be tried with them. Needs torch, transformers and safetensors. Equal arguments give equal weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trtllm_workers.demo import demo_model_path

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")

_LAYERS = 2
_HEADS = 4
_KV_HEADS = 2
_PATCH = 8
_SIDE = 32  # of what LLaVA scales every image to: 16 patches
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

_LLAVA_TOKENS = ("<image>",)
_QWEN_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_LLAVA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' -}}"
    "{%- elif message['role'] not in ['system', 'developer'] -%}"
    "{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' if message['role'] == 'assistant' else ' ' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
_QWEN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def write_vision_model(
    folder: Path,
    family: str,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    dtype: str = "float32",
    old_names: bool = True,
    max_positions: int = 2048,
) -> Path:
    """Write a checkpoint of one of FAMILIES and return its folder.

    ``old_names``: weights are called and settings placed as in the checkpoints that are published;
    without it as transformers 5 names them itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = _LLAVA_TOKENS if family == "llava" else _QWEN_TOKENS
    ids = _write_tokenizer(folder, family, tokens)
    text = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "max_position_embeddings": max_positions,
        "vocab_size": -(-(max(ids.values()) + 1) // 32) * 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "use_cache": True,
        "bos_token_id": None,
    }
    eos = ids["<|end|>"] if family == "llava" else ids["<|im_end|>"]
    config = _config(family, text, ids, eos, nested=not old_names)
    config["torch_dtype" if old_names else "dtype"] = dtype
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos, "do_sample": False})
    _write_json(folder / "preprocessor_config.json", _processor(family))
    weights = _random_weights(_empty_model(folder, family), seed, getattr(torch, dtype))
    rename = _published(family) if old_names else str
    named = {rename(name): tensor for name, tensor in weights.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _config(
    family: str, text: Mapping[str, Any], ids: Mapping[str, int], eos: int, *, nested: bool
) -> dict[str, Any]:
    if family == "llava":
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": ids["<image>"],
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            "eos_token_id": eos,
            "text_config": {"model_type": "llama", "rope_theta": 10000.0, **text},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "projection_dim": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": _SIDE,
                "patch_size": _PATCH,
            },
        }
    size = int(text["hidden_size"])
    quarter = size // _HEADS // 2 // 4  # of the pairs of a head
    rope = {"mrope_section": [quarter * 2, quarter, quarter]}
    vision: dict[str, Any] = {
        "depth": 2,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": _PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": size, "mlp_ratio": 2, "hidden_act": "quick_gelu"}
    else:
        vision |= {
            "hidden_size": 32,
            "out_hidden_size": size,
            "intermediate_size": 64,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        }
    config = {
        "architectures": [
            "Qwen2VLForConditionalGeneration"
            if family == "qwen2_vl"
            else "Qwen2_5_VLForConditionalGeneration"
        ],
        "model_type": family,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "eos_token_id": eos,
        "vision_config": {"model_type": family if not nested else f"{family}_vision", **vision},
    }
    if nested:
        parameters = {"rope_type": "default", "rope_theta": 1000000.0, **rope}
        inner = {"model_type": f"{family}_text", "eos_token_id": eos, "rope_parameters": parameters}
        return {**config, "text_config": {**text, **inner}}
    return {
        **config,
        **text,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", **rope},
        "use_sliding_window": False,
    }


def _processor(family: str) -> dict[str, Any]:
    common = {"image_mean": _MEAN, "image_std": _STD, "do_convert_rgb": True}
    if family == "llava":
        return {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": _SIDE},
            "crop_size": {"height": _SIDE, "width": _SIDE},
            **common,
        }
    cell = (2 * _PATCH) ** 2  # pixels of one row of embeddings
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 4 * cell,
        "max_pixels": 64 * cell,
        "patch_size": _PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **common,
    }


def _write_tokenizer(folder: Path, family: str, tokens: tuple[str, ...]) -> dict[str, int]:
    """Write the demo model's tokenizer with more special tokens; return all special ones' ids."""
    demo = demo_model_path()
    tokenizer = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    first = len(tokenizer["model"]["vocab"])
    added = tokenizer["added_tokens"]
    for number, token in enumerate(tokens):
        added.append({**added[0], "id": first + number, "content": token})
    _write_json(folder / "tokenizer.json", tokenizer)
    settings = json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))
    is_llava = family == "llava"
    settings["chat_template"] = _LLAVA_TEMPLATE if is_llava else _QWEN_TEMPLATE
    settings["eos_token"] = "<|end|>" if is_llava else "<|im_end|>"
    _write_json(folder / "tokenizer_config.json", settings)
    return {entry["content"]: entry["id"] for entry in added}


def _empty_model(folder: Path, family: str) -> torch.nn.Module:
    """Return a model without weights, for their names and shapes."""
    import transformers

    kinds: Mapping[str, Any] = {
        "llava": transformers.LlavaForConditionalGeneration,
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    }
    kind = kinds[family]
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: torch.nn.Module = kind(config)
    return model


def _random_weights(
    model: torch.nn.Module, seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return weights large enough that attention chooses and no two logits are alike."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if "norm" in name or "ln_q" in name:
            return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
        if name.endswith("bias"):
            return 0.3 * values
        if len(shape) < 2 or "embed_tokens" in name or "position_embedding" in name:
            return values
        return values * (1.5 / math.sqrt(math.prod(shape[1:])))

    return {
        name: drawn(name, tensor.shape).to(dtype).contiguous()
        for name, tensor in sorted(model.state_dict().items())
    }


def _published(family: str) -> Callable[[str], str]:
    """Return what turns transformers 5's names of weights into those of published checkpoints."""

    def llava(name: str) -> str:
        for ours, theirs in (
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
        ):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours).removeprefix("vision_model.")
        return name

    def qwen(name: str) -> str:
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    return llava if family == "llava" else qwen


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write a model as the command line says."""
    parser = argparse.ArgumentParser(description="Write a tiny random model of images and text.")
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=64, help="a multiple of 32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-positions", type=int, default=2048)
    args = parser.parse_args()
    folder = write_vision_model(
        args.out,
        args.family,
        seed=args.seed,
        hidden_size=args.hidden_size,
        dtype=args.dtype,
        max_positions=args.max_positions,
    )
    size = (folder / "model.safetensors").stat().st_size
    print(f"{args.family} in {folder}, {size / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    main()

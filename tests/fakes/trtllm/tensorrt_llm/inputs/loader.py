"""The loader of multimodal inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from trtllm_workers.config.vision_model import read_vision

_EMBEDDED = ("image", "multiple_image")


def default_multimodal_input_loader(
    *,
    tokenizer: Any,
    model_dir: str,
    model_type: str,
    modality: str,
    prompts: list[str],
    media: list[Any] | None = None,
    image_data_format: str = "pt",
    num_frames: int = 8,
    mm_embeddings: list[Any] | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Return an input per prompt: each is the only message of a user, its images before its text."""
    del model_type, image_data_format, num_frames, device
    if (media is None) == (mm_embeddings is None):
        raise ValueError("Either media or mm_embeddings must be provided, and not both.")
    if mm_embeddings is not None and modality not in _EMBEDDED:
        raise ValueError(f"Multimodal embeddings are not supported for modality {modality}")
    assert read_vision(Path(model_dir)) is not None  # the real one loads a processor, on every call
    inputs = []
    for prompt, shown in zip(prompts, media or mm_embeddings or [], strict=True):
        several = list(shown) if isinstance(shown, list | tuple) else [shown]
        content = [*({"type": "image"} for _ in several), {"type": "text", "text": prompt}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if mm_embeddings is not None:
            inputs.append({"prompt": text, "multi_modal_embeddings": {"image": several}})
        else:
            pictures = [Image.open(one) if isinstance(one, str) else one for one in several]
            inputs.append({"prompt": text, "multi_modal_data": {"image": pictures}})
    return inputs

"""Images, prompts with images, and what transformers makes of them. Holds no test."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from trtllm_workers.engines.base import ImageEncoder
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import MediaItem

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl")

Image = np.ndarray[Any, np.dtype[np.uint8]]
Part = Sequence[int] | Image | MediaItem


def image_of(seed: int, height: int = 50, width: int = 80) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(encoder: ImageEncoder, store: MediaStore, image: Image) -> MediaItem:
    """Put what an image becomes into a store, pinned once."""
    height, width = image.shape[:2]
    plan = encoder.plan(height, width)
    claim = store.claim(plan.num_bytes)
    encoder.encode(memoryview(image.tobytes()), height, width, claim.runs)
    digest = blake2b(encoder.fingerprint + bytes(image.shape) + image.tobytes(), digest_size=16)
    item = MediaItem(digest.digest(), 0, plan.num_tokens, grid=plan.grid, num_bytes=plan.num_bytes)
    return store.commit(claim, item).item


def put_rows(
    store: MediaStore, rows: torch.Tensor, grid: tuple[int, int, int] | None = None
) -> MediaItem:
    """Put rows that were made elsewhere into a store, pinned once."""
    content = rows.contiguous().view(torch.uint8).numpy().tobytes()
    claim = store.claim(len(content))
    done = 0
    for run in claim.runs:
        run[:] = content[done : done + len(run)]
        done += len(run)
    digest = blake2b(content, digest_size=16).digest()
    item = MediaItem(digest, 0, rows.shape[0], grid=grid, num_bytes=len(content))
    return store.commit(claim, item).item


def place(
    parts: Sequence[Sequence[int] | MediaItem], image_token_id: int
) -> tuple[list[int], list[MediaItem]]:
    """Return a prompt of tokens and images, and its images where they stand in it."""
    tokens: list[int] = []
    media: list[MediaItem] = []
    for part in parts:
        if isinstance(part, MediaItem):
            media.append(msgspec.structs.replace(part, offset=len(tokens)))
            tokens += [image_token_id] * part.num_tokens
        else:
            tokens += part
    return tokens, media


@functools.cache
def reference(folder: Path) -> Any:
    """Return transformers' own model of a folder, which says no end."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind: Any = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.eval()
    return model


def pixels_of(folder: Path, images: Sequence[Image]) -> dict[str, torch.Tensor]:
    """Return what transformers' own processor makes of images."""
    from trtllm_workers.engines.torch.vision.processor import read_processor

    kinds = ("CLIPImageProcessor", "Qwen2VLImageProcessor")
    processor = read_processor(folder, kinds)
    made = processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
    return dict(made)


def _inputs(
    folder: Path, prompt: Sequence[int], images: Sequence[Image], token: int
) -> dict[str, Any]:
    ids = torch.tensor([list(prompt)])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs |= pixels_of(folder, images)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == token).int()
    return inputs


def generate(
    folder: Path, prompt: Sequence[int], images: Sequence[Image], max_tokens: int, token: int
) -> list[int]:
    """Return the greedy tokens of transformers' ``generate``."""
    inputs = _inputs(folder, prompt, images, token)
    with torch.inference_mode():
        out = reference(folder).generate(
            **inputs, do_sample=False, max_new_tokens=max_tokens, pad_token_id=0
        )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def generate_without_cache(
    folder: Path, prompt: Sequence[int], images: Sequence[Image], max_tokens: int, token: int
) -> list[int]:
    """Return greedy tokens of transformers' model, everything computed anew for each of them.

    ``generate`` of transformers 5.23 goes on at other positions than these after a prompt that ends with
    an image, which no chat template makes.
    """
    tokens = list(prompt)
    for _ in range(max_tokens):
        with torch.inference_mode():
            logits = reference(folder)(**_inputs(folder, tokens, images, token)).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def features(folder: Path, image: Image) -> tuple[torch.Tensor, tuple[int, int, int] | None]:
    """Return transformers' embeddings of an image and its grid, before merging."""
    made = pixels_of(folder, [image])
    with torch.inference_mode():
        found = reference(folder).get_image_features(**made).pooler_output
    if "image_grid_thw" not in made:
        return torch.cat(list(found)), None
    time, height, width = made["image_grid_thw"][0].tolist()
    return torch.cat(list(found)), (time, height, width)

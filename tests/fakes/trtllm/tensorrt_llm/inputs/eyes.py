"""The input processor of a model with eyes, and its vision tower: rows that follow from the pixels.

A row of embeddings is played by the text token that its bytes hash to: the language model below knows no
embeddings, and its answer depends on each of them all the same.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trtllm_workers.config.vision_model import read_vision
from trtllm_workers.errors import MediaRejected

# Those that implement attach_multimodal_embeddings.
ATTACHING = ("llava_next", "mistral3", "qwen2_5_vl", "qwen2_vl")
_FEWEST = 16  # ids below are special


class Eyes:
    """One model's."""

    def __init__(self, model: Path) -> None:
        found = read_vision(model)
        assert found is not None, "asked for with a vision-language model"
        self.vision = found
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(model))
        self.dtype = getattr(torch, found.dtype or "bfloat16")

    def look(self, picture: Any) -> torch.Tensor:
        """Return an image's rows."""
        picture = picture.convert("RGB")
        try:
            num_tokens, _grid = self.vision.size_of(picture.height, picture.width)
        except MediaRejected as error:
            raise ValueError(str(error)) from error
        seen = blake2b(picture.tobytes(), digest_size=7)
        seen.update(f"{picture.size}".encode())
        generator = torch.Generator().manual_seed(int.from_bytes(seen.digest(), "big"))
        rows = torch.randn(num_tokens, self.vision.hidden_size, generator=generator)
        return rows.to(self.dtype)

    def process(self, inputs: dict[str, Any], vocab_size: int) -> tuple[list[int], list[int]]:
        """Return the prompt's ids as TensorRT-LLM shows them, and those that play its rows."""
        if "multi_modal_data" in inputs:  # embeddings beside it are not looked at
            shown = inputs["multi_modal_data"]
            if set(shown) != {"image"}:
                raise ValueError(f"modalities {sorted(shown)} are not played here")
            return self._fuse(
                inputs["prompt"], [self.look(one) for one in shown["image"]], vocab_size
            )
        if "multi_modal_embeddings" in inputs:
            return self._attach(inputs, vocab_size)
        ids = self.tokenizer(inputs["prompt"]).input_ids
        return ids, ids

    def _attach(self, inputs: dict[str, Any], vocab_size: int) -> tuple[list[int], list[int]]:
        if self.vision.family not in ATTACHING:
            raise NotImplementedError("Input processor does not support multimodal embedding input")
        given = inputs["multi_modal_embeddings"]
        if not isinstance(given, dict):
            raise ValueError("multimodal_embedding must be a dictionary")
        if "image" not in given:
            raise ValueError("Only image modality is supported for external multimodal embedding")
        rows = [one["mm_embeddings"] if isinstance(one, dict) else one for one in given["image"]]
        hidden = self.vision.hidden_size
        assert all(one.shape[-1] == hidden for one in rows), "embedding_dim must match hidden_size"
        return self._fuse(inputs["prompt"], rows, vocab_size)

    def _fuse(
        self, text: str, rows: list[torch.Tensor], vocab_size: int
    ) -> tuple[list[int], list[int]]:
        """Put the rows where the placeholders are."""
        if not text:
            raise ValueError("Text prompt is required but not provided")
        ids, media = self.tokenizer(text).input_ids, list(rows)
        assert ids.count(self.vision.image_token_id) == len(media), "All images should be consumed"
        shown: list[int] = []
        played: list[int] = []
        for token in ids:
            if token != self.vision.image_token_id:
                shown.append(token)
                played.append(token)
                continue
            tensor = media.pop(0).to(self.dtype).contiguous()
            for row in tensor.view(torch.uint8).reshape(tensor.shape[0], -1):
                digest = blake2b(row.numpy().tobytes(), digest_size=8).digest()
                shown.append(vocab_size + 1)
                played.append(_FEWEST + int.from_bytes(digest, "big") % (vocab_size - _FEWEST))
        return shown, played

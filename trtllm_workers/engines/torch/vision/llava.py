"""LLaVA's vision tower and projector. Knows pixels and rows, no request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trtllm_workers.engines.torch.checkpoint import Checkpoint
from trtllm_workers.engines.torch.vision.processor import pixel_values, read_processor
from trtllm_workers.engines.torch.vision.weights import build
from trtllm_workers.errors import ConfigError, MediaRejected

_PROCESSORS = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor")
# A side may be so many times the other: the shorter is scaled to a fixed length, the longer with it.
_LONGEST = 200
# What an image may take once it is padded to a square.
_MAX_SQUARE = 1 << 26


class LlavaTower:
    """Every image becomes a square of a fixed size, and that a fixed number of rows."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        from transformers import CLIPVisionModel, LlavaConfig, SiglipVisionModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        towers = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
        config = LlavaConfig.from_pretrained(folder, local_files_only=True)
        vision: Any = config.vision_config
        kind = vision.model_type
        if kind not in towers:
            raise ConfigError(
                f"{folder / 'config.json'}: a LLaVA model with a vision tower of type '{kind}' is not "
                f"supported; {', '.join(towers)} are",
                param="model_path",
            )
        self._processor = read_processor(folder, _PROCESSORS)
        self._device, self._dtype = device, dtype
        self._layers: Any = config.vision_feature_layer
        self._first = 1 if config.vision_feature_select_strategy == "default" else 0
        self._tower = build(
            lambda: towers[kind](vision),
            checkpoint,
            ("model.vision_tower.", "vision_tower."),
        ).to(device)
        self._projector = build(
            lambda: LlavaMultiModalProjector(config),
            checkpoint,
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ).to(device)
        self._check(folder, int(vision.image_size))

    def check_size(self, height: int, width: int) -> None:
        """Raise MediaRejected for an image that takes too much to prepare."""
        longer = max(height, width)
        if longer > _LONGEST * min(height, width):
            raise MediaRejected(
                f"an image of {width} × {height} pixels is too long: one side may be at most {_LONGEST} "
                "times the other"
            )
        if getattr(self._processor, "do_pad", False) and longer**2 > _MAX_SQUARE:
            raise MediaRejected(
                f"an image of {width} × {height} pixels is too large to be padded to a square"
            )

    def rows(self, pixels: memoryview, height: int, width: int) -> torch.Tensor:
        """Return the rows [num_tokens, hidden] of one image."""
        values = pixel_values(self._processor, pixels, height, width)["pixel_values"]
        values = values.to(self._device, self._dtype)
        states = self._tower(values, output_hidden_states=True).hidden_states
        layers = [self._layers] if isinstance(self._layers, int) else self._layers
        chosen = torch.cat([states[layer][:, self._first :] for layer in layers], dim=-1)
        rows: torch.Tensor = self._projector(chosen)[0]
        return rows

    def _check(self, folder: Path, side: int) -> None:
        """Raise ConfigError where images are not prepared in the size that the tower takes."""
        made = pixel_values(self._processor, memoryview(bytes(3 * 8 * 12)), 8, 12)["pixel_values"]
        if tuple(made.shape[-2:]) != (side, side):
            raise ConfigError(
                f"{folder}: images are prepared as {list(made.shape[-2:])} pixels (preprocessor_config.json), "
                f"but the vision tower takes {side} × {side} (image_size in config.json)",
                param="model_path",
            )

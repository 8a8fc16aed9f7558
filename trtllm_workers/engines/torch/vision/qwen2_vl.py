"""The vision towers of Qwen2-VL and Qwen2.5-VL. Knows pixels and rows, no request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trtllm_workers.engines.torch.checkpoint import Checkpoint
from trtllm_workers.engines.torch.vision.processor import pixel_values, read_processor
from trtllm_workers.engines.torch.vision.weights import build

_PROCESSORS = ("Qwen2VLImageProcessor",)


class QwenTower:
    """Images keep their shape; 2 × 2 patches become a row (``spatial_merge_size``)."""

    def __init__(
        self,
        family: str,
        folder: Path,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        config, kind = _modules(family)
        vision = config.from_pretrained(folder, local_files_only=True).vision_config
        self._processor = read_processor(folder, _PROCESSORS)
        self._device, self._dtype = device, dtype
        self._tower = build(lambda: kind(vision), checkpoint, ("model.visual.", "visual.")).to(
            device
        )

    def check_size(self, height: int, width: int) -> None:
        """Do nothing: what an image takes is bounded by the processor's ``max_pixels``."""

    def rows(self, pixels: memoryview, height: int, width: int) -> torch.Tensor:
        """Return the rows [num_tokens, hidden] of one image."""
        made = pixel_values(self._processor, pixels, height, width)
        values = made["pixel_values"].to(self._device, self._dtype)
        out = self._tower(values, grid_thw=made["image_grid_thw"].to(self._device))
        # transformers before 5 returns the rows alone.
        rows: torch.Tensor = getattr(out, "pooler_output", out)
        return rows


def _modules(family: str) -> tuple[Any, Any]:
    """Return the classes of a family's config and tower."""
    if family == "qwen2_vl":
        from transformers import Qwen2VLConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VisionTransformerPretrainedModel,
        )

        return Qwen2VLConfig, Qwen2VisionTransformerPretrainedModel
    from transformers import Qwen2_5_VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
    )

    return Qwen2_5_VLConfig, Qwen2_5_VisionTransformerPretrainedModel

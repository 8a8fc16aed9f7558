"""What a worker needs to take images: memory for their rows, and perhaps a vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from trtllm_workers.config.vision_model import VisionModel
from trtllm_workers.engines.torch.checkpoint import Checkpoint
from trtllm_workers.engines.torch.vision.encoder import Tower, TowerEncoder
from trtllm_workers.errors import ConfigError
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import VisionInfo

# Small enough that little of an item's last block is wasted, large enough that blocks move in one go.
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Vision:
    """``rows`` is the store's memory, one row of embeddings each: block by block, in order."""

    info: VisionInfo
    store: MediaStore
    rows: torch.Tensor
    encoder: TowerEncoder | None


def make_vision(
    model: VisionModel, dtype: torch.dtype, cache_bytes: int, encoder: TowerEncoder | None
) -> Vision:
    """Return a model's ``Vision``; ``encoder`` None: it takes only what others encoded."""
    row_bytes = model.hidden_size * dtype.itemsize
    rows_per_block = max(1, _BLOCK_BYTES // row_bytes)
    name = str(dtype).removeprefix("torch.")
    store = MediaStore(
        num_blocks=max(1, cache_bytes // (rows_per_block * row_bytes)),
        rows_per_block=rows_per_block,
        row_size=model.hidden_size,
        dtype=name,
        value_bytes=dtype.itemsize,
    )
    info = model.info(name, encodes=encoder is not None)
    memory = torch.frombuffer(store.pool.memory, dtype=dtype)
    return Vision(info, store, memory.view(-1, model.hidden_size), encoder)


def load_encoder(
    folder: Path,
    model: VisionModel,
    *,
    model_id: str,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[float], None],
) -> TowerEncoder:
    """Read a vision tower, and none of the language model's weights. Raises ConfigError."""
    try:
        from trtllm_workers.engines.torch.vision import processor
    except ImportError as error:
        raise _missing(folder, error) from error
    with Checkpoint(folder, dtype, on_progress) as checkpoint:
        try:
            tower = _tower(folder, model.family, checkpoint, device, dtype)
        except ImportError as error:
            raise _missing(folder, error) from error
    return TowerEncoder(
        tower,
        model,
        dtype=dtype,
        identity=f"{model_id}\0{device.type}\0".encode() + processor.settings_bytes(folder),
    )


def _tower(
    folder: Path, family: str, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Tower:
    if family == "llava":
        from trtllm_workers.engines.torch.vision.llava import LlavaTower

        return LlavaTower(folder, checkpoint, device, dtype)
    from trtllm_workers.engines.torch.vision.qwen2_vl import QwenTower

    return QwenTower(family, folder, checkpoint, device, dtype)


def _missing(folder: Path, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{folder}: this model takes images, and its vision tower needs transformers and Pillow "
        f"({error}); install 'trtllm-launch[vision]'",
        param="model_path",
    )

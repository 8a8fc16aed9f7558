"""The torch engine's ``ImageEncoder``: one image at a time through a vision tower, into given memory."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

import torch

from trtllm_workers.config.vision_model import VisionModel
from trtllm_workers.engines.base import ImagePlan
from trtllm_workers.errors import EngineError, MediaRejected

Grid = tuple[int, int, int]

# Of the thread that encodes. On a CPU a tower's sums come out a little different with another number, and
# the same image must become the same bytes on every worker; nor must images take cores from running streams.
NUM_THREADS = 1


class Tower(Protocol):
    """A family's vision tower: ``rows`` are exactly what goes into the language model."""

    def check_size(self, height: int, width: int) -> None: ...
    def rows(self, pixels: memoryview, height: int, width: int) -> torch.Tensor: ...


class TowerEncoder:
    """See ``engines/base.py: ImageEncoder``.

    Images are computed alone and with ``NUM_THREADS`` threads, so rows depend on pixels only.
    """

    def __init__(
        self,
        tower: Tower,
        model: VisionModel,
        *,
        dtype: torch.dtype,
        identity: bytes,
    ) -> None:
        self._tower = tower
        self._model = model
        self._dtype = dtype
        self._row_bytes = model.hidden_size * dtype.itemsize
        self._fingerprint = blake2b(identity + str(dtype).encode(), digest_size=16).digest()

    @property
    def fingerprint(self) -> bytes:
        return self._fingerprint

    def plan(self, height: int, width: int) -> ImagePlan:
        num_tokens, grid = self._model.size_of(height, width)
        self._tower.check_size(height, width)
        return ImagePlan(num_tokens, num_tokens * self._row_bytes, grid)

    def check_grid(self, num_tokens: int, grid: Grid | None) -> Grid | None:
        """See ``ImageEncoder``; ``grid`` is transformers' ``image_grid_thw``, in patches before merging."""
        model = self._model
        if model.uses_grid:
            return model.check_grid(num_tokens, self._merged(grid))
        takes = model.size_of(1, 1)[0]
        if num_tokens != takes:
            raise MediaRejected(
                f"{num_tokens} embeddings for an image, but this model's images have {takes} each"
            )
        return model.check_grid(num_tokens, grid)

    def encode(
        self, pixels: memoryview, height: int, width: int, into: Sequence[memoryview]
    ) -> None:
        if torch.get_num_threads() != NUM_THREADS:
            torch.set_num_threads(NUM_THREADS)  # of this thread alone
        with torch.inference_mode():
            rows = self._tower.rows(pixels, height, width)
            content = rows.to("cpu", self._dtype).contiguous().view(torch.uint8).view(-1)
        room = sum(piece.nbytes for piece in into)
        if content.numel() != room:
            raise EngineError(
                f"an image of {width} × {height} pixels became {content.numel()} bytes, not the {room} "
                "planned; preprocessor_config.json and the vision tower do not fit"
            )
        done = 0
        for piece in into:
            target = torch.frombuffer(piece, dtype=torch.uint8)
            target.copy_(content[done : done + piece.nbytes])
            done += piece.nbytes

    def _merged(self, grid: Grid | None) -> Grid:
        merge = self._model.spatial_merge_size
        if grid is None:
            raise MediaRejected(
                "the embeddings come without image_grid_thw (time, height and width of the image in "
                "patches), which this model needs; `trtllm-launch embed` writes files that have it"
            )
        time, height, width = grid
        if min(grid) < 1 or height % merge or width % merge:
            raise MediaRejected(
                f"image_grid_thw {list(grid)} is no grid of this model: height and width must be "
                f"multiples of {merge}"
            )
        return time, height // merge, width // merge

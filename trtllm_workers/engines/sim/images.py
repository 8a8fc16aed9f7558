"""Images in the simulator: a vision tower that looks at every pixel and sees a hash. Knows no request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from hashlib import blake2b, shake_128

from trtllm_workers.config.vision_model import VALUE_BYTES, VisionModel
from trtllm_workers.engines.base import ImagePlan
from trtllm_workers.engines.sim.cost import CostModel
from trtllm_workers.types import VisionInfo

# Embeddings repeat themselves after so many values: a prime, so that shifted rows are other rows.
_PERIOD_VALUES = 8191
# The highest byte of every value, little-endian: a finite number of about 1 in each of the dtypes.
_HIGHEST = 0x3F


class SimEncoder:
    """See ``engines/base.py: ImageEncoder``. Encoding takes what the cost model says, asleep."""

    def __init__(
        self,
        model: VisionModel,
        vision: VisionInfo,
        model_id: str,
        cost: CostModel,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._model = model
        self._value_bytes = VALUE_BYTES[vision.dtype]
        self._row_bytes = vision.hidden_size * self._value_bytes
        self._cost = cost
        self._sleep = sleep
        named = f"sim\0{model_id}\0{vision.family}\0{vision.dtype}\0{vision.hidden_size}"
        self._fingerprint = blake2b(named.encode(), digest_size=16).digest()

    @property
    def fingerprint(self) -> bytes:
        return self._fingerprint

    def plan(self, height: int, width: int) -> ImagePlan:
        num_tokens, grid = self._model.size_of(height, width)
        return ImagePlan(num_tokens, num_tokens * self._row_bytes, grid)

    def check_grid(
        self, num_tokens: int, grid: tuple[int, int, int] | None
    ) -> tuple[int, int, int] | None:
        return self._model.check_grid(num_tokens, grid)

    def encode(
        self, pixels: memoryview, height: int, width: int, into: Sequence[memoryview]
    ) -> None:
        began_s = time.monotonic()
        seen = blake2b(pixels, digest_size=32, key=self._fingerprint)
        seen.update(f"{height} {width}".encode())
        size = self._value_bytes
        period = bytearray(shake_128(seen.digest()).digest(_PERIOD_VALUES * size))
        period[size - 1 :: size] = bytes([_HIGHEST]) * _PERIOD_VALUES
        at = 0
        for piece in into:
            first = at % len(period)
            whole = bytes(period) * (-(-(first + len(piece)) // len(period)))
            piece[:] = whole[first : first + len(piece)]
            at += len(piece)
        num_tokens, _grid = self._model.size_of(height, width)
        left_s = self._cost.encode_s(num_tokens) - (time.monotonic() - began_s)
        if left_s > 0:
            self._sleep(left_s)

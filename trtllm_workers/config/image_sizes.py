"""How many tokens an image of some size becomes, by the way a model cuts it up. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from trtllm_workers.errors import MediaRejected

# Time, height and width in merged patches.
Grid = tuple[int, int, int]
# Qwen's processors refuse images that are longer than this many times their other side.
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """Images keep their shape: their sides become multiples of ``factor`` pixels, a token each.

    Their area stays between ``min_pixels`` and ``max_pixels``.
    """

    factor: int
    min_pixels: int
    max_pixels: int

    def __call__(self, height: int, width: int) -> tuple[int, Grid]:
        """Return tokens and grid. Raises MediaRejected for a shape that is too long."""
        rows, columns = (side // self.factor for side in self.resized(height, width))
        return rows * columns, (1, rows, columns)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width that an image is scaled to."""
        if max(height, width) > _LONGEST * min(height, width):
            raise MediaRejected(
                f"an image of {width} × {height} pixels is too long: one side may be at most {_LONGEST} "
                "times the other"
            )
        factor = self.factor
        tall, wide = (round(side / factor) * factor for side in (height, width))
        if tall * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            tall, wide = (
                max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
            )
        elif tall * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            tall, wide = (math.ceil(side * grow / factor) * factor for side in (height, width))
        return tall, wide


@dataclass(frozen=True, slots=True)
class AnyResolution:
    """Images are laid on the best of ``pinpoints`` (height, width), cut into tiles of ``side`` pixels.

    The whole image is a tile of its own. What the padding covers is left out, and each row of patches
    ends with a token more. ``extra`` tokens come once.
    """

    side: int
    patch: int
    extra: int
    pinpoints: tuple[tuple[int, int], ...]

    def __call__(self, height: int, width: int) -> tuple[int, None]:
        """Return tokens; there is no grid."""
        patches = self.side // self.patch
        tall, wide = self._best(height, width)
        rows, columns = patches * (tall // self.side), patches * (wide // self.side)
        if width / height > columns / rows:
            rows -= (rows - _scaled(height, columns, width)) // 2 * 2
        else:
            columns -= (columns - _scaled(width, rows, height)) // 2 * 2
        return rows * columns + rows + patches * patches + self.extra, None

    def _best(self, height: int, width: int) -> tuple[int, int]:
        """Return the pinpoint that shows most of the image and wastes least."""

        def worth(pinpoint: tuple[int, int]) -> tuple[int, int]:
            tall, wide = pinpoint
            scale = min(wide / width, tall / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            return shown, shown - tall * wide

        return max(self.pinpoints, key=worth)


def one_size(side: int, patch: int, extra: int) -> Callable[[int, int], tuple[int, None]]:
    """Return what counts for models that scale every image to ``side`` × ``side`` pixels."""
    num_tokens = (side // patch) ** 2 + extra

    def count(_height: int, _width: int) -> tuple[int, None]:
        return num_tokens, None

    return count


def select_tokens(strategy: str, *, has_class_token: bool) -> int:
    """Return how many tokens beside the patches' are kept: "default" drops the first one there is."""
    return int(has_class_token) - (strategy == "default")


def _scaled(side: int, to: int, of: int) -> int:
    # Rounded as the models do: a product like 23.999999999 is 24.
    return int(round(side * (to / of), 7))

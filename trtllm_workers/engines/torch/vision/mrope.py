"""Where the tokens of a prompt with images stand, for models whose positions are in space. Pure.

Text goes on by one in all three axes (time, height, width) at once. The tokens of an image begin where the
text before it ended and spread over its grid; the text after it goes on behind its longer side. So after
images positions lag behind indices, by the same ``delta`` for everything that is generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trtllm_workers.types import MediaItem

Axes = tuple[list[int], list[int], list[int]]


class Positions:
    """Of one prompt and whatever follows it. ``media`` have grids, do not overlap, and are in order."""

    __slots__ = ("_axes", "_runs", "delta")

    def __init__(self, num_prompt: int, media: Sequence[MediaItem]) -> None:
        time: list[int] = []
        height: list[int] = []
        width: list[int] = []
        at = 0  # the next position
        for item in media:
            text = range(at, at + item.offset - len(time))
            for axis in (time, height, width):
                axis.extend(text)
            at += len(text)
            frames, rows, columns = item.grid or (item.num_tokens, 1, 1)
            for frame in range(frames):
                for row in range(rows):
                    time.extend([at + frame] * columns)
                    height.extend([at + row] * columns)
                    width.extend(range(at, at + columns))
            at += max(rows, columns)
        text = range(at, at + num_prompt - len(time))
        for axis in (time, height, width):
            axis.extend(text)
        self._axes: Axes = (time, height, width)
        self._runs = [(item.offset, item.offset + item.num_tokens) for item in media]
        # Where an image ends a prompt and has more frames than rows and columns, time is ahead.
        self.delta = max(map(max, self._axes), default=-1) + 1 - num_prompt

    def along_time(self, first: int, end: int) -> list[int]:
        """Return the positions of indices [first, end) on the first axis: for text, on all of them."""
        known = self._axes[0]
        positions = known[first:end]
        positions.extend(range(max(first, len(known)) + self.delta, end + self.delta))
        return positions

    def in_images(self, first: int, end: int) -> Iterator[tuple[int, Axes]]:
        """Yield, of each image within indices [first, end), its first index and its positions."""
        for start, stop in self._runs:
            begin, until = max(start, first), min(stop, end)
            if begin < until:
                time, height, width = (axis[begin:until] for axis in self._axes)
                yield begin, (time, height, width)

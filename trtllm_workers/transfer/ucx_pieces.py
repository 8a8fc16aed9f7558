"""What is to be moved: pieces of memory here and there. Knows no UCX call."""

from __future__ import annotations

import contextlib
import ctypes as c
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

SEGMENT_BYTES: Final = 32 * 1024  # what one message carries at most


@dataclass(frozen=True, slots=True)
class Pieces:
    """What one call each must move: addresses here and there, and lengths in bytes."""

    local: list[int]
    remote: list[int]
    lengths: list[int]

    def segments(self) -> Pieces:
        """Return the same pieces, cut into what one message carries each."""
        if max(self.lengths, default=0) <= SEGMENT_BYTES:
            return self
        cut = Pieces([], [], [])
        for here, there, length in zip(self.local, self.remote, self.lengths, strict=True):
            for done in range(0, length, SEGMENT_BYTES):
                cut.local.append(here + done)
                cut.remote.append(there + done)
                cut.lengths.append(min(SEGMENT_BYTES, length - done))
        return cut

    def slices(self, size: int) -> Iterator[Pieces]:
        """Yield the pieces, at most ``size`` at a time."""
        for i in range(0, len(self.local), size):
            end = i + size
            yield Pieces(self.local[i:end], self.remote[i:end], self.lengths[i:end])

    def windows(self, segments: int) -> Iterator[Pieces]:
        """Yield the pieces, cut where needed, at most ``segments`` segments at a time."""
        if max(self.lengths, default=0) <= SEGMENT_BYTES:
            yield from self.slices(segments)
            return
        window = Pieces([], [], [])
        room = segments
        for here, there, length in zip(self.local, self.remote, self.lengths, strict=True):
            done = 0
            while done < length:
                if room == 0:
                    yield window
                    window, room = Pieces([], [], []), segments
                part = min(length - done, room * SEGMENT_BYTES)
                window.local.append(here + done)
                window.remote.append(there + done)
                window.lengths.append(part)
                room -= -(-part // SEGMENT_BYTES)
                done += part
        yield window


def block_pieces(
    local: Sequence[int], remote: Sequence[int], block_bytes: int, local_base: int, remote_base: int
) -> Pieces:
    """Return one piece per run of blocks that lie side by side on both ends."""
    here: list[int] = []
    there: list[int] = []
    lengths: list[int] = []
    next_local = next_remote = -1
    for mine, theirs in zip(local, remote, strict=True):
        if mine == next_local and theirs == next_remote:
            lengths[-1] += block_bytes
        else:
            here.append(local_base + mine * block_bytes)
            there.append(remote_base + theirs * block_bytes)
            lengths.append(block_bytes)
        next_local, next_remote = mine + 1, theirs + 1
    return Pieces(here, there, lengths)


class PinnedBytes:
    """The address of a writable flat view, which cannot go away until ``release``."""

    def __init__(self, memory: memoryview) -> None:
        self.length = memory.nbytes
        self._array: Any = (c.c_char * self.length).from_buffer(memory)
        self.address = c.addressof(self._array)

    def release(self) -> None:
        """Let the memory go; safe twice."""
        with contextlib.suppress(AttributeError):
            del self._array

"""Where a worker keeps what its prompts' images became: blocks of bytes, found by content.

The blocks are a pool like that of the KV cache, so the same transports move them. Knows bytes, digests
and who holds them; no image, no model and no request.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from trtllm_workers.errors import Overloaded
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.types import KvLayout, MediaItem

ORDER = "media,row,dim"


@dataclass(eq=False, slots=True)
class Claim:
    """Blocks that somebody fills, in order; ``runs`` are their bytes, ``num_bytes`` in all."""

    block_ids: list[int]
    num_bytes: int
    runs: list[memoryview] = field(repr=False)


@dataclass(eq=False, slots=True)
class Entry:
    """One filled item. ``item`` describes it; ``num_pins`` holders keep it from eviction."""

    item: MediaItem
    block_ids: list[int]
    num_pins: int = 0


class MediaStore:
    """``num_blocks`` blocks of ``rows_per_block`` rows of ``row_size`` values of ``dtype``.

    All calls belong to one event loop; claimed memory may be filled in any thread. A block is free,
    claimed, or an entry's; an entry that nobody pins goes when room is needed, the least recently used
    first.
    """

    def __init__(
        self, *, num_blocks: int, rows_per_block: int, row_size: int, dtype: str, value_bytes: int
    ) -> None:
        self.row_bytes = row_size * value_bytes
        self.block_bytes = rows_per_block * self.row_bytes
        self._pages = _pages(num_blocks * self.block_bytes)
        self._memory = memoryview(self._pages)
        layout = KvLayout(
            num_layers=1,
            num_kv_heads=1,
            head_dim=row_size,
            block_size=rows_per_block,
            dtype=dtype,
            order=ORDER,
            block_bytes=self.block_bytes,
        )
        self.pool = KvPool(layout, num_blocks, self._memory)
        self._free = list(range(num_blocks))  # ascending
        self._entries: dict[bytes, Entry] = {}
        self._idle: OrderedDict[bytes, None] = (
            OrderedDict()
        )  # without pins, least recently used first
        self._num_claimed = 0

    def num_blocks_of(self, num_bytes: int) -> int:
        """Return how many blocks so many bytes take."""
        return -(-num_bytes // self.block_bytes)

    @property
    def num_entries(self) -> int:
        """Items that are here."""
        return len(self._entries)

    @property
    def num_pinned(self) -> int:
        """Items that somebody needs."""
        return len(self._entries) - len(self._idle)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_claimed_blocks(self) -> int:
        """Blocks that are being filled."""
        return self._num_claimed

    # --- filling -------------------------------------------------------------------------------

    def claim(self, num_bytes: int) -> Claim:
        """Return room to be filled, then committed or dropped.

        Raises Overloaded when pinned items leave no room now, or the store is too small for it at all.
        """
        needed = self.num_blocks_of(num_bytes)
        if needed > self.pool.num_blocks:
            raise Overloaded(
                f"the images of this request take {num_bytes} bytes, more than this worker keeps for "
                f"images at all ({self.pool.num_blocks * self.block_bytes}); the operator can raise "
                "--media-cache-mb"
            )
        while len(self._free) < needed and self._idle:
            self._evict(next(iter(self._idle)))
        if len(self._free) < needed:
            raise Overloaded(
                "this worker's memory for images is full with those of running requests; try again "
                "later (the operator can raise --media-cache-mb)"
            )
        block_ids = self._take(needed)
        self._num_claimed += needed
        return Claim(block_ids, num_bytes, self.runs(block_ids, num_bytes))

    def commit(self, claim: Claim, item: MediaItem) -> Entry:
        """Make a filled claim an entry under ``item.digest``, pinned once for the caller.

        Where an equal one is here already that is returned, and the claim's blocks are free.
        """
        known = self.pin(item.digest)
        if known is not None:
            self.drop(claim)
            return known
        self._num_claimed -= len(claim.block_ids)
        entry = self._entries[item.digest] = Entry(item, claim.block_ids, num_pins=1)
        claim.block_ids, claim.runs = [], []
        return entry

    def drop(self, claim: Claim) -> None:
        """Give a claim's blocks back; of a committed or dropped one does nothing."""
        self._num_claimed -= len(claim.block_ids)
        self._give_back(claim.block_ids)
        claim.block_ids, claim.runs = [], []

    # --- using ---------------------------------------------------------------------------------

    def pin(self, digest: bytes) -> Entry | None:
        """Return an entry that stays until unpinned, or None when it is not here."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.num_pins += 1
            self._idle.pop(digest, None)
        return entry

    def unpin(self, entry: Entry) -> None:
        """Take one pin back."""
        if entry.num_pins < 1:
            raise RuntimeError("an image was let go more often than it was held")
        entry.num_pins -= 1
        if entry.num_pins == 0:
            self._idle[entry.item.digest] = None

    def runs(self, block_ids: Sequence[int], num_bytes: int) -> list[memoryview]:
        """Return the first ``num_bytes`` of these blocks as few long pieces, in order."""
        size, runs, left, at = self.block_bytes, [], num_bytes, 0
        while at < len(block_ids) and left > 0:
            end = at + 1
            while end < len(block_ids) and block_ids[end] == block_ids[end - 1] + 1:
                end += 1
            first = block_ids[at] * size
            length = min(left, (end - at) * size)
            runs.append(self._memory[first : first + length])
            left -= length
            at = end
        return runs

    def bytes_of(self, entry: Entry) -> list[memoryview]:
        """Return an entry's bytes as few long pieces."""
        return self.runs(entry.block_ids, entry.item.num_bytes)

    # -------------------------------------------------------------------------------------------

    def _take(self, count: int) -> list[int]:
        """Take free blocks, next to each other where there are so many."""
        free = self._free
        first = 0
        for at in range(1, len(free)):
            if at - first == count:
                break
            if free[at] != free[at - 1] + 1:
                first = at
        taken = free[first : first + count]
        if len(taken) == count and (not taken or taken[-1] - taken[0] == count - 1):
            del free[first : first + count]
            return taken
        taken = free[:count]
        del free[:count]
        return taken

    def _evict(self, digest: bytes) -> None:
        del self._idle[digest]
        self._give_back(self._entries.pop(digest).block_ids)

    def _give_back(self, block_ids: Sequence[int]) -> None:
        if block_ids:
            self._free = sorted((*self._free, *block_ids))


def byte_store(cache_bytes: int) -> MediaStore:
    """Return a store of bytes, for engines that keep images and rows of any width side by side."""
    rows_per_block, row_bytes = 16, 4096
    return MediaStore(
        num_blocks=max(1, cache_bytes // (rows_per_block * row_bytes)),
        rows_per_block=rows_per_block,
        row_size=row_bytes,
        dtype="uint8",
        value_bytes=1,
    )


def _pages(num_bytes: int) -> mmap.mmap:
    # Untouched pages cost nothing: the kernel gives them when they are written first.
    pages = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

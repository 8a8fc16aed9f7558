"""The virtual KV pool: counts of blocks, and which block hashes it holds. Knows no request.

A block is in one of four states::

    free ──take──▶ private ──store──▶ shared, active ◀──hold── shared, cached
      ▲               │                     │                        ▲ │
      └────release────┘                     └────────release─────────┘ │
      └──────────────────────────── evicted by take ───────────────────┘

Private blocks are partly filled or not reusable. Blocks have no memory, so two streams that compute
the same block share it from the moment it is full. A stream always holds a block together with all
blocks before it and releases the last first; so a held or cached block's parent is there too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from trtllm_workers.engines.sim.events import KvEventLog, Run
from trtllm_workers.types import KvEventKind


class BlockPool:
    """``num_blocks`` virtual blocks; free + cached + active = num_blocks at all times."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.events = KvEventLog(self._runs)
        self._holders: dict[bytes, int] = {}
        # Least recently used first.
        self._cached: OrderedDict[bytes, None] = OrderedDict()
        # Every shared block in the order stored, which puts parents before children.
        self._parents: dict[bytes, bytes | None] = {}

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds that would be reused, or evicted when others are needed."""
        return len(self._cached)

    @property
    def num_active(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - self.num_free - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks ``take`` could give."""
        return self.num_free + len(self._cached)

    def match(self, hashes: Sequence[bytes], limit: int) -> tuple[int, int]:
        """Return how many of the first ``limit`` blocks are here, and how many of those are cached."""
        count = cached = 0
        for digest in hashes[:limit]:
            if digest in self._cached:
                cached += 1
            elif digest not in self._holders:
                break
            count += 1
        return count, cached

    def hold(self, hashes: Sequence[bytes]) -> None:
        """Keep these shared blocks from eviction until released."""
        for digest in hashes:
            if digest in self._holders:
                self._holders[digest] += 1
            else:
                del self._cached[digest]
                self._holders[digest] = 1

    def take(self, count: int) -> None:
        """Make ``count`` private blocks of free ones, evicting cached ones if needed.

        The caller has checked ``num_available``.
        """
        shortage = count - self.num_free
        if shortage > 0:
            evicted = [self._cached.popitem(last=False)[0] for _ in range(shortage)]
            for digest in evicted:
                del self._parents[digest]
            self.num_free += shortage
            self.events.publish(KvEventKind.REMOVED, tuple(evicted))
        self.num_free -= count

    def store(self, hashes: Sequence[bytes], first: int) -> None:
        """Make shared blocks, held once, of the caller's private blocks ``hashes[first:]``."""
        run: list[bytes] = []
        run_parent: bytes | None = None
        for index in range(first, len(hashes)):
            digest = hashes[index]
            if digest in self._parents:
                self.hold((digest,))
                self.num_free += 1  # somebody else filled the same block; ours goes back
                if run:
                    self.events.publish(KvEventKind.STORED, tuple(run), run_parent)
                    run = []
                continue
            parent = hashes[index - 1] if index else None
            if not run:
                run_parent = parent
            run.append(digest)
            self._holders[digest] = 1
            self._parents[digest] = parent
        if run:
            self.events.publish(KvEventKind.STORED, tuple(run), run_parent)

    def release(self, hashes: Sequence[bytes], num_private: int) -> None:
        """Let go of held shared blocks and private ones; the last block is evicted first."""
        self.num_free += num_private
        for digest in reversed(hashes):
            holders = self._holders[digest] - 1
            if holders:
                self._holders[digest] = holders
            else:
                del self._holders[digest]
                self._cached[digest] = None

    def release_all(self) -> None:
        """Let go of every block, whoever holds it."""
        for digest in reversed(self._holders):
            self._cached[digest] = None
        self._holders.clear()
        self.num_free = self.num_blocks - len(self._cached)

    def _runs(self) -> Iterator[Run]:
        run: list[bytes] = []
        run_parent: bytes | None = None
        for digest, parent in self._parents.items():
            if run and parent == run[-1]:
                run.append(digest)
                continue
            if run:
                yield tuple(run), run_parent
            run, run_parent = [digest], parent
        if run:
            yield tuple(run), run_parent

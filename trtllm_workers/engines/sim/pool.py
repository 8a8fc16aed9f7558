"""The KV pool: which block ids are free, and which block hashes it holds. Knows no bytes, no request.

A block is in one of four states::

    free ──take──▶ private ──store──▶ shared, active ◀──hold── shared, cached
      ▲               │                     │                        ▲ │
      └────release────┘                     └────────release─────────┘ │
      └──────────────────────────── evicted by take ───────────────────┘

Private blocks are partly filled or not reusable. Two streams that compute the same block share it
from the moment it is full. A stream always holds a block together with all blocks before it and
releases the last first; so a held or cached block's parent is there too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from trtllm_workers.engines.sim.events import KvEventLog, Run
from trtllm_workers.types import KvEventKind


class BlockPool:
    """Blocks 0 to ``num_blocks`` - 1; free + cached + active = num_blocks at all times.

    ``num_allocated`` and ``num_freed`` count what was given to streams and came back; a block that
    two streams share counts twice.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_allocated = 0
        self.num_freed = 0
        # Ids from ``_num_used`` on were never taken: a list of all ids would cost memory from the start.
        self._num_used = 0
        self._freed: list[int] = []
        self.events = KvEventLog(self._runs)
        self._holders: dict[bytes, int] = {}
        # Least recently used first.
        self._cached: OrderedDict[bytes, None] = OrderedDict()
        # Every shared block in the order stored, which puts parents before children.
        self._parents: dict[bytes, bytes | None] = {}
        self._ids: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self.num_blocks - self._num_used + len(self._freed)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds that would be reused, or evicted when others are needed."""
        return len(self._cached)

    @property
    def num_active(self) -> int:
        """Blocks that requests hold."""
        return self._num_used - len(self._freed) - len(self._cached)

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

    def hold(self, hashes: Sequence[bytes]) -> list[int]:
        """Keep these shared blocks from eviction until released; return their ids."""
        self.num_allocated += len(hashes)
        return [self._hold(digest) for digest in hashes]

    def take(self, count: int) -> list[int]:
        """Return ``count`` private blocks, evicting cached ones if needed.

        The caller has checked ``num_available``.
        """
        shortage = count - self.num_free
        if shortage > 0:
            evicted = [self._cached.popitem(last=False)[0] for _ in range(shortage)]
            for digest in evicted:
                del self._parents[digest]
                self._freed.append(self._ids.pop(digest))
            self.events.publish(KvEventKind.REMOVED, tuple(evicted))
        self.num_allocated += count
        freed = self._freed
        taken = [freed.pop() for _ in range(min(count, len(freed)))]
        fresh = count - len(taken)
        taken += range(self._num_used, self._num_used + fresh)
        self._num_used += fresh
        return taken

    def store(self, hashes: Sequence[bytes], first: int, blocks: list[int]) -> None:
        """Share the caller's private ``blocks[first:]``, full now, under ``hashes[first:]``.

        Where somebody else has filled an equal block it takes the place of ours in ``blocks``, and
        ours becomes free. ``blocks`` may be longer than ``hashes``.
        """
        run: list[bytes] = []
        run_parent: bytes | None = None
        for index in range(first, len(hashes)):
            digest = hashes[index]
            if digest in self._parents:
                self._freed.append(blocks[index])
                blocks[index] = self._hold(digest)
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
            self._ids[digest] = blocks[index]
        if run:
            self.events.publish(KvEventKind.STORED, tuple(run), run_parent)

    def release(self, hashes: Sequence[bytes], private: Sequence[int]) -> None:
        """Let go of held shared blocks and private ones; the last block is evicted first."""
        self.num_freed += len(hashes) + len(private)
        self._freed.extend(reversed(private))
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
        shared = set(self._ids.values())
        self._freed = [block for block in range(self._num_used) if block not in shared]
        self.num_freed = self.num_allocated

    def _hold(self, digest: bytes) -> int:
        if digest in self._holders:
            self._holders[digest] += 1
        else:
            del self._cached[digest]
            self._holders[digest] = 1
        return self._ids[digest]

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

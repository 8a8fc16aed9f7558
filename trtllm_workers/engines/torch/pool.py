"""Which block of the KV pool holds what, for whom. Knows ids and hashes, no bytes and no request.

A block is in one of four states::

    free ──allocate──▶ private ──store──▶ shared, active ◀──hold── shared, cached
      ▲                   │                     │                       ▲ │
      └──────release──────┘                     └───────release─────────┘ │
      └────────────────────── evicted by allocate ────────────────────────┘

Shared blocks have a hash and may be held by several requests. Whoever holds a block holds all
blocks before it and releases the last first; so a held or cached block's parent is always there,
and eviction, least recently used first, takes leaves before what they hang on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from trtllm_workers.engines.event_log import Change
from trtllm_workers.types import KvEventKind


class BlockPool:
    """Blocks 0 to ``num_blocks`` - 1; free + cached + active = num_blocks at all times.

    With ``reuse`` off nothing becomes shared. Not thread-safe: the engine thread owns it.
    """

    def __init__(self, num_blocks: int, *, reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.reuse = reuse
        # Last freed, first taken: its memory is warm. A fresh pool gives 0, 1, 2, …
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._changes: list[Change] = []
        # Holds given and taken back so far; a block held twice counts twice.
        self.num_allocated = 0
        self.num_freed = 0

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Shared blocks nobody holds: reusable, and evicted when others are needed."""
        return len(self._cached)

    @property
    def num_active(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks ``allocate`` could give."""
        return len(self._free) + len(self._cached)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest beginning of ``hashes`` that is here; holds nothing."""
        found: list[int] = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_cached_of(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks nobody holds: holding them lowers ``num_available``."""
        return sum(block in self._cached for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Keep shared blocks from eviction until released."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1
        self.num_allocated += len(blocks)

    def allocate(self, count: int) -> list[int]:
        """Return ``count`` private blocks, evicting cached ones if needed.

        Raises RuntimeError when ``num_available`` is less; nothing has changed then.
        """
        if count > self.num_available:
            raise RuntimeError(
                f"{count} blocks asked of a pool with {self.num_available} available"
            )
        shortage = count - len(self._free)
        if shortage > 0:
            self._evict(shortage)
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        self.num_allocated += count
        return blocks

    def store(self, blocks: list[int], hashes: Sequence[bytes], first: int) -> None:
        """Share ``blocks[first:]``, private so far and now full, under ``hashes[first:]``.

        Where an equal block is here already it takes the place of ours in ``blocks``, and ours
        becomes free. Both lists begin with a prompt's first block and are equally long.
        """
        if not self.reuse:
            return
        run: list[bytes] = []
        for index in range(first, len(blocks)):
            digest, ours = hashes[index], blocks[index]
            known = self._by_hash.get(digest)
            if known is not None:
                self._publish_run(run, hashes, index)
                run = []
                self.hold((known,))
                self.release((ours,))
                blocks[index] = known
                continue
            self._by_hash[digest] = ours
            self._hash_of[ours] = digest
            run.append(digest)
        self._publish_run(run, hashes, len(blocks))

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of held blocks, given in order of their tokens; the last is evicted first."""
        for block in reversed(blocks):
            holders = self._holders[block]
            if holders < 1:
                raise RuntimeError(f"block {block} released more often than held")
            self._holders[block] = holders - 1
            self.num_freed += 1
            if holders > 1:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def take_changes(self) -> list[Change]:
        """Return the changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def hashes(self) -> set[bytes]:
        """Return the hashes of all shared blocks, active and cached."""
        return set(self._by_hash)

    def _evict(self, count: int) -> None:
        gone: list[bytes] = []
        for _ in range(count):
            block, _nothing = self._cached.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None  # cached blocks have hashes
            del self._by_hash[digest]
            self._hash_of[block] = None
            self._free.append(block)
            gone.append(digest)
        self._changes.append(Change(KvEventKind.REMOVED, tuple(gone)))

    def _publish_run(self, run: list[bytes], hashes: Sequence[bytes], end: int) -> None:
        if run:
            first = end - len(run)
            parent = hashes[first - 1] if first else None
            self._changes.append(Change(KvEventKind.STORED, tuple(run), parent))

"""KV events of the sim engine: numbering, snapshots, subscriptions. Knows no pool and no request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

from trtllm_workers.types import KvEvent, KvEventKind

# A run of chained blocks: their hashes, and what the first hangs on (None = a prompt's beginning).
Run = tuple[tuple[bytes, ...], bytes | None]

# A subscriber further behind than this is brought up to date by a new snapshot instead: its memory
# stays bounded, and it sees CLEARED where others would see a gap.
MAX_BACKLOG_EVENTS = 65_536


class _Backlog:
    """What one subscriber has not read yet."""

    __slots__ = ("events", "stale", "wake")

    def __init__(self) -> None:
        self.events: deque[KvEvent] = deque()
        self.stale = True
        self.wake = asyncio.Event()


class KvEventLog:
    """Numbers the changes of one pool and hands them to subscribers.

    ``snapshot`` returns the runs the pool holds now, parents before children.
    """

    def __init__(self, snapshot: Callable[[], Iterable[Run]]) -> None:
        self.seq = 0
        self._snapshot = snapshot
        self._backlogs: set[_Backlog] = set()
        self._closed = False

    def publish(
        self, kind: KvEventKind, hashes: tuple[bytes, ...], parent: bytes | None = None
    ) -> None:
        """Count one change and queue it for every subscriber."""
        self.seq += 1
        if not self._backlogs:
            return
        event = KvEvent(seq=self.seq, kind=kind, block_hashes=hashes, parent_hash=parent)
        for backlog in self._backlogs:
            if len(backlog.events) >= MAX_BACKLOG_EVENTS:
                backlog.stale = True
                backlog.events.clear()
            if not backlog.stale:
                backlog.events.append(event)
            backlog.wake.set()

    async def follow(self) -> AsyncIterator[KvEvent]:
        """Yield a snapshot, then every later event in order, until the log closes."""
        backlog = _Backlog()
        self._backlogs.add(backlog)
        try:
            while True:
                if backlog.stale:
                    backlog.stale = False
                    backlog.events.extend(self._snapshot_events())
                while backlog.events and not backlog.stale:
                    yield backlog.events.popleft()
                if backlog.stale:
                    continue
                if self._closed:
                    return
                backlog.wake.clear()
                await backlog.wake.wait()
        finally:
            self._backlogs.discard(backlog)

    def close(self) -> None:
        """Let subscribers read what is queued, then end."""
        self._closed = True
        for backlog in self._backlogs:
            backlog.wake.set()

    def _snapshot_events(self) -> list[KvEvent]:
        seq = self.seq
        stored = [
            KvEvent(seq=seq, kind=KvEventKind.STORED, block_hashes=hashes, parent_hash=parent)
            for hashes, parent in self._snapshot()
        ]
        return [KvEvent(seq=seq, kind=KvEventKind.CLEARED), *stored]

"""KV events of an engine, on the event loop: numbers, snapshots, subscriptions.

An engine hands over the changes of its prefix cache after each step; this log numbers them and keeps
which block hangs on which, so that a snapshot needs no look into the engine. Knows no request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from trtllm_workers.types import KvEvent, KvEventKind

# A subscriber further behind than this is brought up to date by a new snapshot instead.
MAX_BACKLOG_EVENTS = 65_536


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the prefix cache, not yet numbered; see ``types.KvEvent``."""

    kind: KvEventKind
    hashes: tuple[bytes, ...] = ()
    parent: bytes | None = None


class _Subscription:
    """What one subscriber has not read yet."""

    __slots__ = ("events", "needs_snapshot", "wake")

    def __init__(self) -> None:
        self.events: deque[KvEvent] = deque()
        self.needs_snapshot = True
        self.wake = asyncio.Event()


class KvEventLog:
    """Numbers changes from 1 and hands them to every subscriber; used on the loop only."""

    def __init__(self) -> None:
        self.seq = 0
        self._parents: dict[bytes, bytes | None] = {}  # in order stored: parents before children
        self._subscriptions: set[_Subscription] = set()
        self._closed = False

    def apply(self, changes: Iterable[Change]) -> None:
        """Take over the pool's changes, in order."""
        for change in changes:
            self.seq += 1
            self._remember(change)
            if not self._subscriptions:
                continue
            event = KvEvent(
                seq=self.seq,
                kind=change.kind,
                block_hashes=change.hashes,
                parent_hash=change.parent,
            )
            for subscription in self._subscriptions:
                self._hand(subscription, event)

    async def follow(self) -> AsyncIterator[KvEvent]:
        """Yield a snapshot, then every later event in order, until the log closes."""
        subscription = _Subscription()
        self._subscriptions.add(subscription)
        try:
            while True:
                if subscription.needs_snapshot:
                    subscription.needs_snapshot = False
                    subscription.events.extend(self._snapshot())
                while subscription.events and not subscription.needs_snapshot:
                    yield subscription.events.popleft()
                if subscription.needs_snapshot:
                    continue
                if self._closed:
                    return
                subscription.wake.clear()
                await subscription.wake.wait()
        finally:
            self._subscriptions.discard(subscription)

    def __len__(self) -> int:
        """How many blocks are cached."""
        return len(self._parents)

    def __contains__(self, digest: bytes) -> bool:
        """Whether a block is cached."""
        return digest in self._parents

    def close(self) -> None:
        """Let subscribers read what is queued, then end."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.wake.set()

    def _remember(self, change: Change) -> None:
        if change.kind is KvEventKind.CLEARED:
            self._parents.clear()
            return
        if change.kind is KvEventKind.REMOVED:
            for digest in change.hashes:
                del self._parents[digest]
            return
        parent = change.parent
        for digest in change.hashes:
            self._parents[digest] = parent
            parent = digest

    def _hand(self, subscription: _Subscription, event: KvEvent) -> None:
        if len(subscription.events) >= MAX_BACKLOG_EVENTS:
            subscription.needs_snapshot = True
            subscription.events.clear()
        if not subscription.needs_snapshot:
            subscription.events.append(event)
        subscription.wake.set()

    def _snapshot(self) -> list[KvEvent]:
        events = [KvEvent(seq=self.seq, kind=KvEventKind.CLEARED)]
        run: list[bytes] = []
        run_parent: bytes | None = None
        for digest, parent in self._parents.items():
            if run and parent == run[-1]:
                run.append(digest)
                continue
            if run:
                events.append(self._stored(run, run_parent))
            run, run_parent = [digest], parent
        if run:
            events.append(self._stored(run, run_parent))
        return events

    def _stored(self, run: list[bytes], parent: bytes | None) -> KvEvent:
        return KvEvent(
            seq=self.seq, kind=KvEventKind.STORED, block_hashes=tuple(run), parent_hash=parent
        )

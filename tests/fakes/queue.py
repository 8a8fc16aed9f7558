"""A work queue inside one process, for tests: it behaves, and can go away. Share one hub."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from trtllm_workers.errors import QueueAway, QueueFull


@dataclass
class _Kept:
    handle: int
    body: bytes
    num_deliveries: int = 0
    waits: bool = True
    timer: asyncio.TimerHandle | None = None


@dataclass
class MemoryQueueHub:
    """What all queues of one name have in common."""

    ack_wait_s: float = 5.0
    max_items: int = 0
    max_age_s: float = 3600.0
    away: bool = False
    kept: dict[int, _Kept] = field(default_factory=dict)
    last: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def give_back(self, one: _Kept) -> None:
        if self.kept.get(one.handle) is one:
            one.waits = True
            self.tell()

    def drop(self, handle: int) -> None:
        one = self.kept.pop(handle, None)
        if one is not None and one.timer is not None:
            one.timer.cancel()
        self.tell()

    def later(self, one: _Kept, seconds: float) -> None:
        if one.timer is not None:
            one.timer.cancel()
        loop = asyncio.get_running_loop()
        one.timer = loop.call_later(seconds, self.give_back, one)


class MemoryQueue:
    """Implements WorkQueue."""

    def __init__(self, hub: MemoryQueueHub) -> None:
        self._hub = hub
        self._stopped = False
        self._closed = False

    @property
    def connected(self) -> bool:
        return not (self._hub.away or self._closed)

    async def put(self, body: bytes) -> int:
        hub = self._hub
        self._require()
        await asyncio.sleep(0)
        self._require()
        if hub.max_items and len(hub.kept) >= hub.max_items:
            raise QueueFull(f"the queue holds {hub.max_items} items already")
        hub.last += 1
        handle = hub.last
        hub.kept[handle] = _Kept(handle, body)
        asyncio.get_running_loop().call_later(hub.max_age_s, hub.drop, handle)
        hub.tell()
        return handle

    async def remove(self, handle: int) -> None:
        await asyncio.sleep(0)
        if self.connected:
            self._hub.drop(handle)

    async def depth(self) -> int:
        self._require()
        return len(self._hub.kept)

    async def take(self, timeout_s: float) -> MemoryItem | None:
        hub = self._hub
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if self._stopped or not self.connected:
                        await asyncio.sleep(0)
                        if self._closed or self._stopped:
                            return None
                    else:
                        for one in hub.kept.values():
                            if one.waits:
                                one.waits = False
                                one.num_deliveries += 1
                                hub.later(one, hub.ack_wait_s)
                                return MemoryItem(hub, one)
                    await hub.changed.wait()
        except TimeoutError:
            return None

    async def stop_taking(self) -> None:
        self._stopped = True
        self._hub.tell()

    async def close(self) -> None:
        self._closed = self._stopped = True
        self._hub.tell()

    def _require(self) -> None:
        if not self.connected:
            raise QueueAway("the queue is away")


class MemoryItem:
    """Implements Item."""

    def __init__(self, hub: MemoryQueueHub, kept: _Kept) -> None:
        self._hub = hub
        self._kept = kept
        self.body = kept.body
        self.num_deliveries = kept.num_deliveries

    async def ack(self) -> None:
        if not self._hub.away:
            self._hub.drop(self._kept.handle)

    async def nak(self, delay_s: float = 0.0) -> None:
        if not self._hub.away and self._kept.handle in self._hub.kept:
            self._hub.later(self._kept, delay_s)

    async def working(self) -> None:
        if not self._hub.away and not self._kept.waits:
            self._hub.later(self._kept, self._hub.ack_wait_s)

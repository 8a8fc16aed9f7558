"""The work queue's contract, on a real NATS server and on the stand-in that other tests use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.fakes.nats_server import NatsServer, nats_server
from tests.fakes.queue import MemoryQueue, MemoryQueueHub
from trtllm_workers.config.outside import NatsLogin
from trtllm_workers.errors import QueueAway, QueueFull
from trtllm_workers.planes.queue import Item, WorkQueue
from trtllm_workers.planes.queue_nats import QueueSpec, open_nats_queue

DEADLINE_S = 15.0
ACK_WAIT_S = 0.4
SOON_S = 0.2  # for what must not happen


class Place(Protocol):
    """Where queues are opened; ``stop`` and ``start`` are of the server behind them."""

    async def open(self, **spec: Any) -> WorkQueue: ...
    async def stop(self) -> None: ...
    async def start(self) -> None: ...


class NatsPlace:
    def __init__(self, server: NatsServer, stack: AsyncExitStack) -> None:
        self.server = server
        self._stack = stack

    async def open(self, **spec: Any) -> WorkQueue:
        decides = spec.pop("decides", True)
        queue = await open_nats_queue(
            [self.server.url],
            NatsLogin(),
            QueueSpec("work", **{"ack_wait_s": ACK_WAIT_S, **spec}),
            name="test",
            decides=decides,
        )
        self._stack.push_async_callback(queue.close)
        return queue

    async def stop(self) -> None:
        await asyncio.to_thread(self.server.stop)

    async def start(self) -> None:
        await asyncio.to_thread(self.server.start)


class MemoryPlace:
    def __init__(self) -> None:
        self.hub = MemoryQueueHub(ack_wait_s=ACK_WAIT_S)

    async def open(self, **spec: Any) -> WorkQueue:
        spec.pop("decides", True)
        for name, value in spec.items():
            setattr(self.hub, name, value)
        return MemoryQueue(self.hub)

    async def stop(self) -> None:
        self.hub.away = True
        self.hub.tell()

    async def start(self) -> None:
        self.hub.away = False
        self.hub.tell()


@pytest.fixture(params=["nats", "memory"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    if request.param == "memory":
        yield MemoryPlace()
        return
    with nats_server(tmp_path / "nats") as server:
        async with AsyncExitStack() as stack:
            yield NatsPlace(server, stack)


async def taken(queue: WorkQueue) -> Item:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            item = await queue.take(1.0)
            if item is not None:
                return item


async def until(met: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await met():  # noqa: ASYNC110 - what a server knows has no event here
            await asyncio.sleep(0.02)


async def test_items_come_in_order_once_and_go_when_acknowledged(place: Place) -> None:
    puts, takes = await place.open(), await place.open()
    handles = [await puts.put(b"item %d" % n) for n in range(5)]
    assert len(set(handles)) == 5
    assert await puts.depth() == 5
    items = [await taken(takes) for _ in range(5)]
    assert [item.body for item in items] == [b"item %d" % n for n in range(5)]
    assert [item.num_deliveries for item in items] == [1] * 5
    assert await puts.depth() == 5, "those worked on count too"
    for item in items:
        await item.ack()

    async def empty() -> bool:
        return await puts.depth() == 0

    await until(empty)
    assert await takes.take(SOON_S) is None


async def test_a_take_that_waits_gets_what_is_put(place: Place) -> None:
    queue = await place.open()
    waiting = asyncio.create_task(queue.take(DEADLINE_S))
    await queue.put(b"one")
    item = await waiting
    assert item is not None
    assert item.body == b"one"
    await item.ack()


async def test_two_takers_share_the_items(place: Place) -> None:
    queues = [await place.open() for _ in range(3)]
    for n in range(20):
        await queues[0].put(b"%d" % n)
    found: list[bytes] = []

    async def work(queue: WorkQueue) -> None:
        while (item := await queue.take(SOON_S)) is not None:
            found.append(item.body)
            await item.ack()

    await asyncio.gather(*(work(queue) for queue in queues[1:]))
    assert sorted(found) == sorted(b"%d" % n for n in range(20))


async def test_an_item_of_a_silent_taker_is_given_to_another(place: Place) -> None:
    first, second = await place.open(), await place.open()
    await first.put(b"one")
    lost = await taken(first)
    again = await taken(second)
    assert again.body == lost.body
    assert again.num_deliveries == 2
    await again.ack()
    await lost.ack()  # too late, and no harm
    assert await second.take(2 * ACK_WAIT_S) is None


async def test_an_item_worked_on_is_nobody_elses(place: Place) -> None:
    queue, other = await place.open(), await place.open()
    await queue.put(b"one")
    item = await taken(queue)
    waiting = asyncio.create_task(other.take(5 * ACK_WAIT_S))
    for _ in range(10):
        await asyncio.wait({waiting}, timeout=ACK_WAIT_S / 3)
        await item.working()
    assert not waiting.done()
    await item.ack()
    assert await waiting is None


async def test_an_item_given_back_comes_at_once_or_after_its_delay(place: Place) -> None:
    queue = await place.open(ack_wait_s=60.0)
    await queue.put(b"one")
    await (await taken(queue)).nak()
    item = await taken(queue)
    assert item.num_deliveries == 2
    await item.nak(2 * SOON_S)
    assert await queue.take(SOON_S) is None
    assert (await taken(queue)).num_deliveries == 3


async def test_a_removed_item_is_gone_taken_or_not(place: Place) -> None:
    queue = await place.open()
    handles = [await queue.put(b"%d" % n) for n in range(3)]
    item = await taken(queue)
    await queue.remove(handles[0])
    await queue.remove(handles[1])
    await queue.remove(handles[1])
    assert await queue.depth() == 1
    await item.nak()
    assert (await taken(queue)).body == b"2"
    assert await queue.take(2 * ACK_WAIT_S) is not None, "only what is kept comes again"


async def test_the_limit_holds_whoever_puts_at_the_same_time(place: Place) -> None:
    queues = [await place.open(max_items=4) for _ in range(3)]
    results = await asyncio.gather(
        *(queue.put(b"x") for queue in queues * 4), return_exceptions=True
    )
    assert sum(isinstance(one, int) for one in results) == 4
    assert sum(isinstance(one, QueueFull) for one in results) == 8
    item = await taken(queues[0])
    with pytest.raises(QueueFull, match="holds 4 items"):
        await queues[1].put(b"y")
    await item.ack()

    async def room() -> bool:
        return await queues[0].depth() == 3

    await until(room)
    await queues[1].put(b"y")


async def test_an_old_item_goes_by_itself(place: Place) -> None:
    queue = await place.open(max_age_s=0.3)
    await queue.put(b"one")

    async def empty() -> bool:
        return await queue.depth() == 0

    await until(empty)
    assert await queue.take(SOON_S) is None


async def test_who_stops_taking_gives_back_what_was_on_its_way(place: Place) -> None:
    leaves, stays = await place.open(ack_wait_s=60.0), await place.open(ack_wait_s=60.0)
    await leaves.put(b"kept")
    kept = await taken(leaves)
    waiting = asyncio.create_task(leaves.take(DEADLINE_S))
    await asyncio.wait({waiting}, timeout=0.05)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await leaves.put(b"one")  # the server may send it to the one that asked first
    await leaves.stop_taking()
    item = await taken(stays)
    assert item.body == b"one"
    await item.ack()
    assert await leaves.take(SOON_S) is None
    await kept.ack()

    async def empty() -> bool:
        return await stays.depth() == 0

    await until(empty)


async def test_a_server_that_comes_back_has_what_it_kept(place: Place) -> None:
    puts, takes = await place.open(), await place.open()
    await puts.put(b"one")
    await puts.put(b"two")
    held = await taken(takes)
    await place.stop()

    async def away() -> bool:
        return not (puts.connected or takes.connected)

    await until(away)
    with pytest.raises(QueueAway):
        await puts.put(b"lost")
    with pytest.raises(QueueAway):
        await puts.depth()
    assert await takes.take(SOON_S) is None
    for say in (held.ack, held.nak, held.working):
        await say()  # lost, and nobody is told
    await puts.remove(1)
    await place.start()

    async def back() -> bool:
        return puts.connected and takes.connected

    await until(back)
    assert await puts.put(b"three") > 0
    bodies: set[bytes] = set()
    while len(bodies) < 3:
        item = await taken(takes)
        bodies.add(item.body)
        await item.ack()
    assert bodies == {b"one", b"two", b"three"}


async def test_a_taker_leaves_the_limits_as_they_are(place: Place) -> None:
    await place.open(max_items=2)
    queue = await place.open(decides=False, max_items=2)
    await queue.put(b"1")
    await queue.put(b"2")
    with pytest.raises(QueueFull):
        await queue.put(b"3")


async def test_close_ends_everything_twice(place: Place) -> None:
    queue = await place.open()
    await queue.put(b"one")
    await queue.close()
    await queue.close()
    assert not queue.connected
    assert await queue.take(SOON_S) is None
    with pytest.raises(QueueAway):
        await queue.put(b"two")

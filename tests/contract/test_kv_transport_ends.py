"""Peers that die or stand still, cancellation, closing and idling: the contract of KvLink and KvTransport.

The other end is a real process, killed and stopped for real.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.contract.transports import (
    BIG_BYTES,
    DEADLINE_S,
    MARK,
    NUM_BLOCKS,
    SHORT_S,
    SLACK_S,
    Peer,
    Stage,
    crc,
    encoded,
    fails,
    mark,
    marked,
    ours,
    theirs,
    untouched,
)
from trtllm_workers.errors import TransferFailed, TransportUnavailable
from trtllm_workers.transfer.base import KvPool

Leftovers = tuple[int, Counter[str], Counter[str], set[str], int]

# Peers that die or stand still


async def test_a_killed_peer_fails_every_operation(stage: Stage) -> None:
    peer, link, pool = await stage.linked()
    await link.read([0], [0], DEADLINE_S)
    peer.kill()
    assert "peer" in await fails(link.read([0], [1], SHORT_S * 5), SHORT_S * 5)
    assert "peer" in await fails(link.write([1], [0], SHORT_S * 5), SHORT_S * 5)
    assert "peer" in await fails(link.notify(b"hello", SHORT_S * 5), SHORT_S * 5)
    mark(pool)
    assert marked(pool)


async def test_a_peer_killed_during_reads_fails_them_and_the_bytes_stop(stage: Stage) -> None:
    peer, link, pool = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    started = asyncio.Event()

    async def read_on() -> None:
        while True:
            await link.read(range(NUM_BLOCKS), range(NUM_BLOCKS), SHORT_S * 5)
            started.set()

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        reading = group.create_task(fails(read_on()))
        await started.wait()
        peer.kill()
    assert "peer" in reading.result()
    mark(pool)
    second = await stage.peer("second", block_bytes=BIG_BYTES)
    await second.holds([0])
    assert marked(pool)


async def stopped(
    peer: Peer, pool: KvPool, operation: Callable[[], Awaitable[object]]
) -> str | None:
    """Run an operation on a stopped peer, give our pool away, and let the peer go on.

    Returns the words of the failure. None: it needed nothing of the peer's process and succeeded.
    """
    peer.stop()
    words = None
    began = time.monotonic()
    try:
        await operation()
    except TransferFailed as error:
        words = str(error)
    assert time.monotonic() - began < SHORT_S + SLACK_S
    if words is not None:
        mark(pool)
    peer.resume()
    return words


async def test_a_read_from_a_stopped_peer_ends_by_the_deadline_and_moves_nothing_later(
    stage: Stage,
) -> None:
    peer, link, pool = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    every = range(NUM_BLOCKS)
    await link.read(every, every, DEADLINE_S)
    words = await stopped(peer, pool, lambda: link.read(every, every, SHORT_S))
    await peer.holds([0])
    if words is None:
        assert all(bytes(pool.block(i)) == theirs(i, BIG_BYTES) for i in every)
    else:
        assert "peer" in words
        assert marked(pool)
    await link.read([3], [4], DEADLINE_S)  # connects anew where it must
    assert bytes(pool.block(4)) == theirs(3, BIG_BYTES)
    if words is not None:
        pool.block(4)[:] = MARK * BIG_BYTES
        assert marked(pool)


async def test_a_write_to_a_stopped_peer_ends_by_the_deadline(stage: Stage) -> None:
    peer, link, pool = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    every = range(NUM_BLOCKS)
    await link.write([0], [0], DEADLINE_S)
    words = await stopped(peer, pool, lambda: link.write(every, every, SHORT_S))
    sums = await peer.holds(every)
    if words is None:
        assert sums == [crc(ours(i, BIG_BYTES)) for i in every]
    else:
        # Our source blocks were given away at once: their new content must not have been sent.
        assert crc(MARK * BIG_BYTES) not in sums
    await link.write([1], [2], DEADLINE_S)
    assert await peer.holds([2]) == [crc(pool.block(1))]


async def test_a_stopped_peer_disturbs_no_other_link(stage: Stage) -> None:
    peer, link, pool = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    transport, second_pool = await stage.ours(peer_id="second", block_bytes=BIG_BYTES)
    well = await stage.peer("well", block_bytes=BIG_BYTES)
    slow, quick = (
        await transport.connect(peer.card, DEADLINE_S),
        await transport.connect(well.card, DEADLINE_S),
    )
    peer.stop()

    async def outcome() -> None:
        try:
            await slow.read(range(24), range(24), SLACK_S)
        except TransferFailed:
            return

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        waits = group.create_task(outcome())
        await asyncio.sleep(0)
        began = time.monotonic()
        for _ in range(5):
            await quick.read(range(24, 48), range(24, 48), SLACK_S)
            await quick.notify(b"well", SLACK_S)
        took_s = time.monotonic() - began
        assert took_s < SLACK_S
        waits.cancel()
    assert bytes(second_pool.block(30)) == theirs(30, BIG_BYTES)
    assert len(await well.ask("await_notes", count=5)) == 5
    peer.resume()
    await link.read([0], [0], DEADLINE_S)
    assert bytes(pool.block(0)) == theirs(0, BIG_BYTES)


async def test_a_cancelled_read_has_stopped_when_it_ends(stage: Stage) -> None:
    peer, link, pool = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    every = range(NUM_BLOCKS)
    await link.read([0], [0], DEADLINE_S)
    peer.stop()
    reading = asyncio.ensure_future(link.read(every, every, SHORT_S * 4))
    await asyncio.sleep(0)
    reading.cancel()
    began = time.monotonic()
    await asyncio.wait([reading])
    assert reading.cancelled()
    assert time.monotonic() - began < SHORT_S * 4 + SLACK_S
    mark(pool)
    peer.resume()
    await peer.holds([0])
    assert marked(pool)
    await link.read([3], [4], DEADLINE_S)
    assert bytes(pool.block(4)) == theirs(3, BIG_BYTES)


async def test_reads_cancelled_midway_leave_the_link_usable(stage: Stage) -> None:
    peer, link, pool = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    every = range(NUM_BLOCKS)
    for turns in range(12):
        reading = asyncio.ensure_future(link.read(every, every, DEADLINE_S))
        for _ in range(turns * 8):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        mark(pool)
        await peer.holds([turns])
        assert marked(pool)
    await link.read([1], [2], DEADLINE_S)
    assert bytes(pool.block(2)) == theirs(1, BIG_BYTES)


async def test_a_writer_that_is_killed_leaves_our_transport_well(stage: Stage) -> None:
    peer, link, _ = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    transport, pool = await stage.ours(peer_id="second", block_bytes=BIG_BYTES)
    writer = await stage.peer("writer", block_bytes=BIG_BYTES)
    theirs_to_us = await writer.ask("connect", card=encoded(transport.card()), timeout_s=DEADLINE_S)
    blocks = list(range(NUM_BLOCKS))
    await writer.order("write_on", link=theirs_to_us, local=blocks, remote=blocks)
    assert await writer.answer() == "writing"
    writer.kill()
    again = await transport.connect(peer.card, DEADLINE_S)
    await again.read([7], [8], DEADLINE_S)
    assert bytes(pool.block(8)) == theirs(7, BIG_BYTES)
    await link.notify(b"well", DEADLINE_S)


# The end


async def test_after_close_every_call_of_a_link_fails(stage: Stage) -> None:
    _, link, pool = await stage.linked()
    await link.read([0], [0], DEADLINE_S)
    await link.close()
    await link.close()
    for operation in (
        link.read([0], [1], DEADLINE_S),
        link.write([1], [0], DEADLINE_S),
        link.notify(b"", DEADLINE_S),
        link.read([], [], DEADLINE_S),
    ):
        assert "peer" in await fails(operation)
    assert untouched(pool, {0})


async def test_closing_one_link_leaves_another_to_the_same_peer(stage: Stage) -> None:
    peer = await stage.peer()
    transport, pool = await stage.ours()
    first, second = [await transport.connect(peer.card, DEADLINE_S) for _ in range(2)]
    await first.read([0], [0], DEADLINE_S)
    await first.close()
    await second.read([1], [1], DEADLINE_S)
    assert bytes(pool.block(1)) == theirs(1)


async def test_close_of_a_transport_ends_its_links_and_is_safe_twice(stage: Stage) -> None:
    peer = await stage.peer()
    transport, _ = await stage.ours()
    link = await transport.connect(peer.card, DEADLINE_S)
    await transport.close()
    await transport.close()
    await fails(link.read([0], [0], DEADLINE_S))
    await fails(transport.connect(peer.card, DEADLINE_S))
    await link.close()


async def test_close_ends_an_operation_that_waits(stage: Stage) -> None:
    peer, _, _ = await stage.linked()
    transport, _ = await stage.ours(peer_id="second")
    link = await transport.connect(peer.card, DEADLINE_S)
    peer.stop()
    waiting = asyncio.ensure_future(link.notify(b"anyone?", DEADLINE_S * 2))
    await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_S):
        await transport.close()
        outcome = await asyncio.gather(waiting, return_exceptions=True)
    assert outcome[0] is None or isinstance(outcome[0], TransferFailed)
    peer.resume()


async def test_close_is_safe_before_start_and_after_a_failed_one(stage: Stage) -> None:
    never = stage.opened()
    await never.close()
    transport = stage.opened(host="203.0.113.1")  # a documentation address: not of this machine
    _, pool = await stage.ours(peer_id="second")
    with contextlib.suppress(TransportUnavailable):  # one that does not listen starts
        await transport.start(pool)
    await transport.close()
    await transport.close()


async def test_close_leaves_no_thread_socket_or_shared_memory(stage: Stage) -> None:
    async def life() -> None:
        peer = await stage.peer()
        transport, pool = await stage.ours()
        link = await transport.connect(peer.card, DEADLINE_S)
        await link.read([0], [0], DEADLINE_S)
        await link.notify(b"", DEADLINE_S)
        assert bytes(pool.block(0)) == theirs(0)
        await peer.ask("close")
        await transport.close()
        peer.end()

    # One thread: else the loop makes more of them whenever two calls overlap.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    await life()  # libraries may keep what they make once
    before = left_behind()
    await life()
    deadline = time.monotonic() + SLACK_S
    # The kernel lists a thread for a moment after it was joined.
    while more := added(before, left_behind()):
        assert time.monotonic() < deadline, more
        await asyncio.sleep(0.01)


def added(before: Leftovers, after: Leftovers) -> list[str]:
    """Return what there was not before."""
    more = [*(after[1] - before[1]), *(after[2] - before[2]), *(after[3] - before[3])]
    if after[0] > before[0]:
        more.append(f"{after[0]} Python threads")
    if after[4] > before[4]:
        more.append(f"{after[4]} tasks")
    return more


def left_behind() -> Leftovers:
    """Return what this process has: Python threads, threads, sockets, shared memory, tasks."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    sockets = Counter(name.split(":")[0] for name in files if name.startswith(("socket", "anon")))
    shared = {
        line.split(maxsplit=5)[5]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/dev/shm" in line or "SYSV" in line
    }
    threads = []
    for number in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name = Path(f"/proc/self/task/{number}/comm").read_text()
            # gRPC's pool grows and shrinks as it likes once another test has used etcd.
            if not name.startswith(("event_engine", "grpc_", "lifeguard", "default-executo")):
                threads.append(name)
    return (
        threading.active_count(),
        Counter(threads),
        sockets,
        shared,
        len(asyncio.all_tasks()),
    )


async def test_an_idle_transport_costs_no_cpu(stage: Stage) -> None:
    peer, link, _ = await stage.linked()
    await link.read([0], [0], DEADLINE_S)
    await link.notify(b"", DEADLINE_S)
    theirs_s, ours_s = await peer.ask("cpu_s"), time.process_time()
    began = time.monotonic()
    await asyncio.sleep(1.0)  # the time that is measured
    idle_s = time.monotonic() - began
    assert time.process_time() - ours_s < 0.05 * idle_s
    assert await peer.ask("cpu_s") - theirs_s < 0.05 * idle_s


async def test_nothing_is_printed(stage: Stage, capfd: pytest.CaptureFixture[str]) -> None:
    with capture_logs():  # what libraries print is meant
        peer, link, _ = await stage.linked()
        await link.read([0], [0], DEADLINE_S)
        peer.stop()
        with contextlib.suppress(TransferFailed):
            await link.read(range(NUM_BLOCKS), range(NUM_BLOCKS), SHORT_S)
        peer.resume()
        await peer.holds([0])
        await peer.ask("close")
        await link.close()
    assert peer.printed() == b""
    assert capfd.readouterr().out == ""

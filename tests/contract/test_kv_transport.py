"""Each line of the docstrings of KvLink and KvTransport, on every transport, against real processes."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from tests.contract.transports import (
    BLOCK_BYTES,
    DEADLINE_S,
    KINDS,
    NUM_BLOCKS,
    Kind,
    Peer,
    Stage,
    crc,
    encoded,
    ours,
    theirs,
    with_other_token,
)
from trtllm_workers.errors import LayoutMismatch, TransferFailed, TransportUnavailable
from trtllm_workers.transfer.base import KvPool

SHORT_S = 0.4  # the deadline of what is meant to miss it
SLACK_S = 5.0  # a shared machine may let us wait that long beside it
BIG_BYTES = 256 * 1024
MARK = b"\xa5"


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    if reason := found.missing():
        pytest.skip(reason)
    return found


@pytest.fixture
async def stage(kind: Kind, tmp_path: Path) -> AsyncIterator[Stage]:
    made = Stage(kind, lambda: (tmp_path / f"out-{os.urandom(4).hex()}").open("w+b"))
    yield made
    await made.close()


def untouched(pool: KvPool, but: set[int] = frozenset()) -> bool:  # type: ignore[assignment]
    """Return whether our pool still holds what it held, except for some blocks."""
    return all(
        bytes(pool.block(block_id)) == ours(block_id, pool.layout.block_bytes)
        for block_id in range(pool.num_blocks)
        if block_id not in but
    )


def mark(pool: KvPool) -> None:
    """Give the whole pool to somebody else."""
    pool.memory[:] = MARK * len(pool.memory)


def marked(pool: KvPool) -> bool:
    return bytes(pool.memory) == MARK * len(pool.memory)


async def fails(operation: Awaitable[object], within_s: float = DEADLINE_S) -> str:
    """Return the words of the TransferFailed that must come within a time."""
    began = time.monotonic()
    with pytest.raises(TransferFailed) as caught:
        await operation
    assert time.monotonic() - began < within_s + SLACK_S
    return str(caught.value)


# Reads and writes


async def test_read_copies_blocks_pairwise_in_any_scatter(stage: Stage) -> None:
    _, link, pool = await stage.linked()
    remote = [7, 8, 9, 0, 47, 3, 20, 19, 18]
    local = [1, 2, 40, 41, 42, 5, 30, 31, 0]
    await link.read(remote, local, DEADLINE_S)
    for theirs_id, ours_id in zip(remote, local, strict=True):
        assert bytes(pool.block(ours_id)) == theirs(theirs_id)
    assert untouched(pool, set(local))


async def test_write_puts_blocks_into_the_peers_memory_before_it_returns(stage: Stage) -> None:
    peer, link, pool = await stage.linked()
    local = [1, 2, 40, 41, 42, 5, 30, 31, 0]
    remote = [7, 8, 9, 0, 47, 3, 20, 19, 18]
    await link.write(local, remote, DEADLINE_S)
    expected = {block_id: crc(theirs(block_id)) for block_id in range(NUM_BLOCKS)}
    expected |= {to: crc(ours(of)) for of, to in zip(local, remote, strict=True)}
    assert await peer.holds(range(NUM_BLOCKS)) == list(expected.values())
    assert untouched(pool)


async def test_a_peer_can_write_into_our_pool(stage: Stage) -> None:
    peer, _, pool = await stage.linked()
    transport, pool = await stage.ours(peer_id="second")
    link = await peer.ask("connect", card=encoded(transport.card()), timeout_s=DEADLINE_S)
    await peer.ask("write", link=link, local=[4, 5, 9], remote=[9, 3, 4], timeout_s=DEADLINE_S)
    assert [bytes(pool.block(i)) for i in (9, 3, 4)] == [theirs(i) for i in (4, 5, 9)]
    assert untouched(pool, {9, 3, 4})


async def test_random_reads_and_writes_keep_both_pools_exact(stage: Stage) -> None:
    draw = random.Random(20)
    peer, link, pool = await stage.linked()
    here = [ours(block_id) for block_id in range(NUM_BLOCKS)]
    there = [theirs(block_id) for block_id in range(NUM_BLOCKS)]
    for _ in range(25):
        count = draw.choice([1, 2, 3, 8, 17, NUM_BLOCKS])
        local, remote = (draw.sample(range(NUM_BLOCKS), count) for _ in range(2))
        if draw.random() < 0.5:  # runs of neighbours, which a transport may join
            local.sort()
            remote.sort()
        if draw.random() < 0.5:
            await link.read(remote, local, DEADLINE_S)
            for of, to in zip(remote, local, strict=True):
                here[to] = there[of]
        else:
            await link.write(local, remote, DEADLINE_S)
            for of, to in zip(local, remote, strict=True):
                there[to] = here[of]
        assert bytes(pool.memory) == b"".join(here)
    assert await peer.holds(range(NUM_BLOCKS)) == [crc(content) for content in there]


async def test_several_reads_and_writes_run_at_once(stage: Stage) -> None:
    peer, link, pool = await stage.linked()
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        for first in range(0, 24, 2):  # reads into the first half, writes from the second
            group.create_task(
                link.read([first, first + 1], [first + 1, first], DEADLINE_S)  # type: ignore[arg-type]
            )
            group.create_task(link.write([first + 24], [first + 24], DEADLINE_S))  # type: ignore[arg-type]
    for first in range(0, 24, 2):
        assert bytes(pool.block(first)) == theirs(first + 1)
        assert bytes(pool.block(first + 1)) == theirs(first)
    sums = [crc(ours(i)) if i % 2 == 0 else crc(theirs(i)) for i in range(24, 48)]
    assert await peer.holds(range(24, 48)) == sums


async def test_a_large_read_and_write_are_exact(stage: Stage) -> None:
    peer, link, pool = await stage.linked(num_blocks=NUM_BLOCKS, block_bytes=BIG_BYTES)
    await link.write(range(24, 48), range(24), DEADLINE_S)
    await link.read(range(24, 48), range(24), DEADLINE_S)
    assert await peer.holds(range(24)) == [crc(ours(i, BIG_BYTES)) for i in range(24, 48)]
    assert [crc(pool.block(i)) for i in range(24)] == [
        crc(theirs(i, BIG_BYTES)) for i in range(24, 48)
    ]


async def test_empty_lists_move_nothing(stage: Stage) -> None:
    _, link, pool = await stage.linked()
    await link.read([], [], DEADLINE_S)
    await link.write([], [], DEADLINE_S)
    assert untouched(pool)


async def test_pools_of_unlike_size_exchange_blocks(stage: Stage) -> None:
    peer = await stage.peer(num_blocks=90)
    transport, pool = await stage.ours(num_blocks=3)
    link = await transport.connect(peer.card, DEADLINE_S)
    await link.read([89, 88, 0], [0, 1, 2], DEADLINE_S)
    assert bytes(pool.memory) == theirs(89) + theirs(88) + theirs(0)


@pytest.mark.parametrize(
    ("remote", "local"),
    [
        ([0, NUM_BLOCKS], [0, 1]),
        ([0, -1], [0, 1]),
        ([0, 1], [0, NUM_BLOCKS]),
        ([0, 1], [0, -1]),
        ([0, 1], [0]),
        ([], [0]),
        ([0, 2**40], [0, 1]),
    ],
)
async def test_a_wrong_block_id_moves_nothing_and_names_the_peer(
    stage: Stage, remote: list[int], local: list[int]
) -> None:
    peer, link, pool = await stage.linked()
    assert "peer" in await fails(link.read(remote, local, DEADLINE_S))
    assert "peer" in await fails(link.write(local, remote, DEADLINE_S))
    assert untouched(pool)
    assert await peer.holds([0, 1]) == [crc(theirs(0)), crc(theirs(1))]
    await link.read([5], [6], DEADLINE_S)
    assert bytes(pool.block(6)) == theirs(5)


async def test_wire_says_what_carries_the_bytes_or_unknown(stage: Stage) -> None:
    _, link, _ = await stage.linked()
    await link.read([0], [0], DEADLINE_S)
    assert link.wire
    assert link.peer_id == "peer"
    if stage.kind.name == "tcp":
        assert link.wire == "tcp"


# Notifications


async def test_notify_arrives_once_with_our_name_after_earlier_writes(stage: Stage) -> None:
    peer, link, _ = await stage.linked()
    for round_ in range(NUM_BLOCKS):
        await link.write([round_], [0], DEADLINE_S)
        await link.notify(b"written %d" % round_, DEADLINE_S)
    await link.notify(b"", DEADLINE_S)
    await link.notify(bytes(range(256)) * 16, DEADLINE_S)
    notes = await peer.ask("await_notes", count=NUM_BLOCKS + 2)
    assert len(notes) == NUM_BLOCKS + 2
    assert {who for who, _, _ in notes} == {"ours"}
    assert [looks for _, _, looks in notes[:NUM_BLOCKS]] == [
        crc(ours(round_)) for round_ in range(NUM_BLOCKS)
    ]


async def test_notify_calls_on_the_loop_that_started_the_transport(stage: Stage) -> None:
    peer = await stage.peer()
    transport, _ = await stage.ours()
    link = await peer.ask("connect", card=encoded(transport.card()), timeout_s=DEADLINE_S)
    assert link == 0
    other, _ = await stage.ours(peer_id="other")
    direct = await other.connect(transport.card(), DEADLINE_S)
    await direct.notify(b"hello", DEADLINE_S)
    async with asyncio.timeout(DEADLINE_S):
        while not stage.notes:
            await asyncio.sleep(0)
    assert stage.notes == [("other", b"hello")]


# Connecting


async def test_unlike_layouts_are_shown_before_a_byte_moves(stage: Stage) -> None:
    peer = await stage.peer()
    transport, pool = await stage.ours(dtype="bfloat16", block_size=64)
    with pytest.raises(LayoutMismatch) as caught:
        await transport.connect(peer.card, DEADLINE_S)
    for words in ("peer", "bfloat16", "float32", "block_size is 64 here and 32 there"):
        assert words in str(caught.value)
    assert untouched(pool)


async def test_a_card_of_another_transport_is_refused(stage: Stage) -> None:
    peer = await stage.peer()
    transport, _ = await stage.ours()
    card = msgspec.structs.replace(peer.card, transport="pigeon")
    words = await fails(transport.connect(card, DEADLINE_S))
    assert "pigeon" in words
    assert stage.kind.name in words


async def test_a_card_with_another_token_is_refused(stage: Stage) -> None:
    peer = await stage.peer()
    transport, pool = await stage.ours()
    words = await fails(transport.connect(with_other_token(peer.card), SHORT_S * 5), SHORT_S * 5)
    assert "peer" in words
    assert untouched(pool)
    link = await transport.connect(peer.card, DEADLINE_S)
    await link.read([1], [1], DEADLINE_S)
    assert bytes(pool.block(1)) == theirs(1)


async def test_a_damaged_card_is_refused(stage: Stage) -> None:
    peer = await stage.peer()
    transport, _ = await stage.ours()
    for address in (b"", b"\x00", b"\xff" * 40, peer.card.address[:20]):
        card = msgspec.structs.replace(peer.card, address=address)
        assert "peer" in await fails(transport.connect(card, SHORT_S * 5), SHORT_S * 5)


async def test_connect_to_a_dead_peer_fails(stage: Stage) -> None:
    peer = await stage.peer()
    transport, _ = await stage.ours()
    peer.kill()
    assert "peer" in await fails(transport.connect(peer.card, SHORT_S * 5), SHORT_S * 5)


async def test_connect_to_a_stopped_peer_ends_by_the_deadline(stage: Stage) -> None:
    peer = await stage.peer()
    transport, pool = await stage.ours()
    peer.stop()
    try:
        link = await transport.connect(peer.card, SHORT_S)
    except TransferFailed as error:
        assert "peer" in str(error)
    else:  # one that needs no answer of the peer's process must then read rightly
        await link.read([1], [1], DEADLINE_S)
        assert bytes(pool.block(1)) == theirs(1)
    peer.resume()
    link = await transport.connect(peer.card, DEADLINE_S)
    await link.read([2], [2], DEADLINE_S)
    assert bytes(pool.block(2)) == theirs(2)


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
    try:
        await transport.start(pool)
    except TransportUnavailable as error:
        assert stage.kind.name in str(error)
        assert "203.0.113.1" in str(error)
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

    await life()  # libraries may keep what they make once
    before = left_behind()
    await life()
    after = left_behind()
    assert after == before


def left_behind() -> tuple[int, int, list[str], set[str], int]:
    """Return what this process has: Python threads, threads, sockets, shared memory, tasks."""
    files = []
    for number in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    sockets = sorted(name.split(":")[0] for name in files if name.startswith(("socket", "anon")))
    return (
        threading.active_count(),
        len(os.listdir("/proc/self/task")),
        sockets,
        set(os.listdir("/dev/shm")),
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
    peer, link, _ = await stage.linked()
    await link.read([0], [0], DEADLINE_S)
    peer.stop()
    try:
        await link.read(range(NUM_BLOCKS), range(NUM_BLOCKS), SHORT_S)
    except TransferFailed:
        pass
    peer.resume()
    await peer.holds([0])
    await peer.ask("close")
    await link.close()
    assert peer.printed() == b""
    assert capfd.readouterr().out == ""

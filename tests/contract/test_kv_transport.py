"""Reads, writes, notifications and connecting: the contract of KvLink and KvTransport on every transport.

The other end is a real process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import msgspec
import pytest

from tests.contract.transports import (
    BIG_BYTES,
    DEADLINE_S,
    NUM_BLOCKS,
    SHORT_S,
    SLACK_S,
    Stage,
    crc,
    encoded,
    fails,
    ours,
    theirs,
    untouched,
    with_other_token,
)
from trtllm_workers.errors import LayoutMismatch, TransferFailed

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
            group.create_task(link.read([first, first + 1], [first + 1, first], DEADLINE_S))
            group.create_task(link.write([first + 24], [first + 24], DEADLINE_S))
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
    if stage.kind.name == "tcp" or stage.kind.wire:
        assert link.wire == "tcp"


# Notifications


async def test_notify_arrives_once_with_our_name_after_earlier_writes(stage: Stage) -> None:
    peer, link, _ = await stage.linked()
    for round_ in range(NUM_BLOCKS):
        await link.write([round_], [round_], DEADLINE_S)
        await link.notify(b"%d" % round_, DEADLINE_S)
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
        await stage.noted.wait()
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
    words = await fails(
        transport.connect(with_other_token(stage.kind, peer.card), SHORT_S * 5), SHORT_S * 5
    )
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
    began = time.monotonic()
    # One that needs nothing of the peer's process may succeed.
    with contextlib.suppress(TransferFailed):
        await transport.connect(peer.card, SHORT_S)
    assert time.monotonic() - began < SHORT_S + SLACK_S
    peer.resume()
    link = await transport.connect(peer.card, DEADLINE_S)
    await link.read([2], [2], DEADLINE_S)
    assert bytes(pool.block(2)) == theirs(2)

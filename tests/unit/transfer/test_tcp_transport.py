"""What is particular to the tcp transport; what every transport does is in tests/contract."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.fakes.transport_peer import fill, make_layout, make_pool, pattern
from trtllm_workers.errors import TransferFailed, TransportUnavailable
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.tcp import TcpTransport
from trtllm_workers.transfer.tcp_channel import Channel, Door, dial, read_door
from trtllm_workers.transfer.tcp_frames import (
    HEAD,
    VERSION,
    Hello,
    Read,
    Ready,
    Refusal,
    Write,
    pack,
    pack_ids,
)
from trtllm_workers.types import TransportCard

DEADLINE_S = 20.0
SIZE = 4096
NUM_BLOCKS = 8


def made(peer_id: str = "owner", host: str = "127.0.0.1") -> TcpTransport:
    return TcpTransport(peer_id=peer_id, host=host, on_notify=lambda _peer_id, _message: None)


def filled(seed: int) -> KvPool:
    pool = make_pool(NUM_BLOCKS, make_layout(SIZE))
    fill(pool, seed)
    return pool


@pytest.fixture
async def owner() -> AsyncIterator[tuple[TcpTransport, KvPool]]:
    transport, pool = made(), filled(1)
    await transport.start(pool)
    yield transport, pool
    await transport.close()


async def dialled(card: TransportCard) -> Channel:
    """Return an authenticated connection whose frames the test sends itself."""
    channel, layout, num_blocks = await dial(read_door(card, Door), "tcp", "tester", card.peer_id)
    assert (layout, num_blocks) == (card.layout, card.num_blocks)
    return channel


def intact(pool: KvPool, seed: int, but: set[int]) -> bool:
    return all(
        bytes(pool.block(i)) == pattern(seed, i, SIZE) for i in range(NUM_BLOCKS) if i not in but
    )


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
async def test_an_ipv6_host_works() -> None:
    transport, reader, pool = made(host="::1"), made("reader", host="::1"), filled(2)
    try:
        try:
            await transport.start(filled(1))
        except TransportUnavailable as error:
            pytest.skip(f"no IPv6 loopback: {error}")
        await reader.start(pool)
        link = await reader.connect(transport.card(), DEADLINE_S)
        await link.read([3], [4], DEADLINE_S)
        assert bytes(pool.block(4)) == pattern(1, 3, SIZE)
    finally:
        await reader.close()
        await transport.close()


async def test_a_host_of_another_machine_is_named() -> None:
    transport = made(host="203.0.113.1")
    with pytest.raises(TransportUnavailable, match=r"tcp cannot listen on 203\.0\.113\.1"):
        await transport.start(filled(1))
    await transport.close()


async def test_a_card_before_start_is_refused() -> None:
    with pytest.raises(TransportUnavailable, match="start it first"):
        made().card()


async def test_the_owner_ends_a_write_at_its_deadline(owner: tuple[TcpTransport, KvPool]) -> None:
    transport, pool = owner
    channel = await dialled(transport.card())
    async with asyncio.timeout(DEADLINE_S):
        await channel.say(Write(pack_ids([2, 3]), 0.2))
        await channel.expect(Ready)
        await channel.say(Ready(), memoryview(bytes(100)))  # frames are bytes too, once it is ready
        began = time.monotonic()
        with pytest.raises(ConnectionError):
            await channel.hear()
    assert time.monotonic() - began < 5
    first, second = bytes(pool.block(2)), bytes(pool.block(3))
    with contextlib.suppress(OSError):
        await channel.say(Ready(), memoryview(bytes(SIZE)))
    channel.close()
    assert (bytes(pool.block(2)), bytes(pool.block(3))) == (first, second)
    assert intact(pool, 1, {2})


@pytest.mark.parametrize("ask", [Read, Write])
async def test_the_owner_refuses_a_block_outside_its_pool(
    owner: tuple[TcpTransport, KvPool], ask: type[Read] | type[Write]
) -> None:
    transport, pool = owner
    channel = await dialled(transport.card())
    async with asyncio.timeout(DEADLINE_S):
        await channel.say(ask(pack_ids([0, NUM_BLOCKS]), 5.0))
        assert await channel.hear() == Refusal(f"block {NUM_BLOCKS} is outside the pool of 8")
        await channel.say(Read(pack_ids([1]), 5.0))  # the connection lives on
        await channel.expect(Ready)
    channel.close()
    assert intact(pool, 1, set())


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(64),
        HEAD.pack(2**31) + b"x",
        pack(Read(pack_ids([0]), 5.0)),
        pack(Hello(VERSION + 1, "tcp", "stranger", os.urandom(32))),
        pack(Hello(VERSION, "ucx", "stranger", os.urandom(32))),
    ],
)
async def test_a_stranger_is_hung_up_on(owner: tuple[TcpTransport, KvPool], said: bytes) -> None:
    transport, pool = owner
    door = read_door(transport.card(), Door)
    reader, writer = await asyncio.open_connection(door.host, door.port)
    async with asyncio.timeout(DEADLINE_S):
        writer.write(said)
        try:
            writer.write_eof()
            heard = await reader.read()
        except OSError:
            heard = b""
        writer.close()
    assert pattern(1, 0, SIZE)[:16] not in heard
    assert intact(pool, 1, set())


async def test_another_worker_on_the_same_port_is_not_taken_for_the_peer(
    owner: tuple[TcpTransport, KvPool],
) -> None:
    transport, _ = owner
    reader = made("reader")
    await reader.start(filled(2))
    card = msgspec.structs.replace(transport.card(), peer_id="prefill-7")
    with pytest.raises(TransferFailed, match="prefill-7: owner listens there now"):
        await reader.connect(card, DEADLINE_S)
    await reader.close()


async def test_a_connection_that_the_owner_closed_is_replaced(
    owner: tuple[TcpTransport, KvPool],
) -> None:
    transport, _ = owner
    reader, pool = made("reader"), filled(2)
    await reader.start(pool)
    link = await reader.connect(transport.card(), DEADLINE_S)
    for channel in link._idle:  # type: ignore[attr-defined]  # the test stands in for the network
        channel.sock.shutdown(socket.SHUT_RDWR)
    await link.read([5], [6], DEADLINE_S)
    assert bytes(pool.block(6)) == pattern(1, 5, SIZE)
    await reader.close()


async def test_more_operations_than_connections_take_their_turn(
    owner: tuple[TcpTransport, KvPool],
) -> None:
    transport, _ = owner
    reader, pool = made("reader"), filled(2)
    await reader.start(pool)
    link = await reader.connect(transport.card(), DEADLINE_S)
    await asyncio.gather(
        *(link.read([i % NUM_BLOCKS], [i % NUM_BLOCKS], DEADLINE_S) for i in range(60))
    )
    assert intact(pool, 1, set())
    await reader.close()

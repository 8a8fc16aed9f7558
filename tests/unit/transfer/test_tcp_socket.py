from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.transport_peer import fill, make_layout, make_pool
from trtllm_workers.transfer import tcp_socket

POOL = make_pool(12, make_layout(64))
fill(POOL, 3)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    yield ends
    for end in ends:
        end.close()


@given(st.lists(st.integers(0, POOL.num_blocks - 1), max_size=30))
def test_spans_hold_the_blocks_in_order(block_ids: list[int]) -> None:
    pieces = tcp_socket.spans(POOL, block_ids)
    assert b"".join(pieces) == b"".join(POOL.block(block_id) for block_id in block_ids)


def test_spans_join_neighbours_only() -> None:
    pieces = tcp_socket.spans(POOL, [3, 4, 5, 1, 0, 7, 8])
    assert [len(piece) // 64 for piece in pieces] == [3, 1, 1, 2]


async def test_many_small_pieces_and_large_ones_arrive_in_order(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, right = pair
    sizes = [1] * 300 + [3_000_000, 5, 10_000_000, 1]
    source = memoryview(bytes(range(256)) * (sum(sizes) // 256 + 1))[: sum(sizes)]
    target = bytearray(sum(sizes))

    def cut(whole: memoryview) -> list[memoryview]:
        pieces, at = [], 0
        for size in sizes:
            pieces.append(whole[at : at + size])
            at += size
        return pieces

    async with asyncio.TaskGroup() as group:
        group.create_task(tcp_socket.send(left, cut(source)))
        group.create_task(tcp_socket.receive(right, [memoryview(target)]))
    assert target == source
    target[:] = bytes(len(target))
    async with asyncio.TaskGroup() as group:
        group.create_task(tcp_socket.send(left, [source]))
        group.create_task(tcp_socket.receive(right, cut(memoryview(target))))
    assert target == source


async def test_the_end_of_the_stream_is_an_error(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, right = pair
    assert not tcp_socket.ended(right)
    left.send(b"ab")
    assert not tcp_socket.ended(right)
    left.close()
    with pytest.raises(ConnectionResetError):
        await tcp_socket.receive(right, [memoryview(bytearray(3))])
    assert tcp_socket.ended(right)


async def test_a_cancelled_receive_watches_the_socket_no_more(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, right = pair
    into = bytearray(4)
    receiving = asyncio.ensure_future(tcp_socket.receive(right, [memoryview(into)]))
    await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.wait([receiving])
    assert not asyncio.get_running_loop().remove_reader(right)
    left.send(b"late")
    assert into == bytes(4)

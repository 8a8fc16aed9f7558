"""Bytes straight between non-blocking sockets and memory, many pieces per system call.

Runs on the event loop of a transport's thread. No copy is made on this side of the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

from trtllm_workers.transfer.base import KvPool

_PIECES_PER_CALL: Final = 64  # well below IOV_MAX, 1,024
# Bytes moved before others on the loop get their turn: about 2 ms.
_BYTES_PER_TURN: Final = 4 * 1024 * 1024
_ABORT: Final = struct.pack("ii", 1, 0)


def spans(pool: KvPool, block_ids: Sequence[int]) -> list[memoryview]:
    """Return the memory of blocks in order, neighbours in one piece. Ids must be valid."""
    pieces: list[memoryview] = []
    size = pool.layout.block_bytes
    at = 0
    while at < len(block_ids):
        first = at
        while at + 1 < len(block_ids) and block_ids[at + 1] == block_ids[at] + 1:
            at += 1
        at += 1
        begin = block_ids[first] * size
        pieces.append(pool.memory[begin : begin + (at - first) * size])
    return pieces


async def receive(sock: socket.socket, pieces: list[memoryview]) -> None:
    """Fill all pieces, in order; uses up the list. Raises ConnectionError at the stream's end."""
    loop = asyncio.get_running_loop()

    def some(first: int) -> int:
        taken = sock.recvmsg_into(pieces[first : first + _PIECES_PER_CALL])[0]
        if not taken:
            raise ConnectionResetError("the connection ended")
        return taken

    await _move(pieces, some, lambda woken: _readable(loop, sock, woken))


async def send(sock: socket.socket, pieces: list[memoryview]) -> None:
    """Hand all pieces to the kernel, in order; uses up the list."""
    loop = asyncio.get_running_loop()

    def some(first: int) -> int:
        return sock.sendmsg(pieces[first : first + _PIECES_PER_CALL])

    await _move(pieces, some, lambda woken: _writable(loop, sock, woken))


async def _move(
    pieces: list[memoryview],
    some: Callable[[int], int],
    watch: Callable[[asyncio.Future[None]], Callable[[], object]],
) -> None:
    first = 0
    in_turn = 0
    while first < len(pieces):
        try:
            moved = some(first)
        except (BlockingIOError, InterruptedError):
            in_turn = 0
            await _until(watch)
            continue
        in_turn += moved
        while moved:
            size = len(pieces[first])
            if moved < size:
                pieces[first] = pieces[first][moved:]
                break
            moved -= size
            first += 1
        if in_turn >= _BYTES_PER_TURN:
            in_turn = 0
            await asyncio.sleep(0)


async def _until(watch: Callable[[asyncio.Future[None]], Callable[[], object]]) -> None:
    woken = asyncio.get_running_loop().create_future()
    unwatch = watch(woken)
    try:
        await woken
    finally:
        unwatch()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


def _readable(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, woken: asyncio.Future[None]
) -> Callable[[], object]:
    loop.add_reader(sock, _wake, woken)
    return lambda: loop.remove_reader(sock)


def _writable(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, woken: asyncio.Future[None]
) -> Callable[[], object]:
    loop.add_writer(sock, _wake, woken)
    return lambda: loop.remove_writer(sock)


def abort(sock: socket.socket) -> None:
    """Close at once; what the kernel has not sent yet is dropped. Safe twice."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    sock.close()


def ended(sock: socket.socket) -> bool:
    """Return whether the other side has closed the connection or is gone. Takes nothing from it."""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True

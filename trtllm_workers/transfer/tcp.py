"""The transport that is always there: blocks over TCP connections. Standard library only.

A thread of its own moves the bytes between sockets and pool memory. One connection carries one
operation at a time and is kept for the next; operations side by side use several. When one breaks,
is cancelled or too late, its connection is torn before the caller hears of it, and the next operation
connects anew: so the bytes have stopped, and nobody else was disturbed.

What holds for a write that breaks: its source may be reused at once. At the owner, bytes that
were on their way may still land, but not after the write's ``timeout_s``, counted from when the owner
heard of it: then the owner tears the connection too. So whoever waits that long after a peer fell
silent may give the blocks to somebody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from trtllm_workers.errors import LayoutMismatch, TransferFailed, TransportUnavailable
from trtllm_workers.transfer import tcp_socket
from trtllm_workers.transfer.base import (
    KvLink,
    KvPool,
    OnNotify,
    check_block_ids,
    check_layouts,
)
from trtllm_workers.transfer.tcp_channel import Channel, Door, Listener, Owner, dial, read_door
from trtllm_workers.transfer.tcp_frames import (
    TOKEN_BYTES,
    Done,
    Notify,
    Read,
    Ready,
    Write,
    pack_ids,
)
from trtllm_workers.transfer.tcp_owner import serve_pool
from trtllm_workers.transfer.tcp_thread import LoopThread, bounded
from trtllm_workers.types import TransportCard

NAME: Final = "tcp"
_MAX_CONNECTIONS: Final = 8  # of one link; further operations wait their turn

T = TypeVar("T")


class TcpLink:
    """A way to one peer's pool; see KvLink. Made by TcpTransport.connect."""

    def __init__(
        self, thread: LoopThread, pool: KvPool, our_id: str, peer_id: str, door: Door
    ) -> None:
        self._thread = thread
        self._pool = pool
        self._our_id = our_id
        self._peer_id = peer_id
        self._door = door
        self._num_remote = 0
        self._closed = False
        # The rest is touched on the thread only.
        self._idle: list[Channel] = []
        self._busy: set[asyncio.Task[Any]] = set()
        self._turns = asyncio.Semaphore(_MAX_CONNECTIONS)

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def wire(self) -> str:
        return "tcp"

    @property
    def closed(self) -> bool:
        return self._closed

    async def open(self, timeout_s: float) -> None:
        """Make the first connection. Raises LayoutMismatch or TransferFailed."""

        async def connects() -> None:
            async with self._channel():
                pass

        await self._run("connect to", timeout_s, connects)

    async def read(self, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> None:
        self._check("read from", local, remote)
        if not remote:
            return
        packed = pack_ids(remote)

        async def moves() -> None:
            end_s = _now_s() + timeout_s
            async with self._channel() as channel:
                await channel.say(Read(packed, end_s - _now_s()))
                await channel.expect(Ready)
                await tcp_socket.receive(channel.sock, tcp_socket.spans(self._pool, local))

        await self._run("read from", timeout_s, moves)

    async def write(self, local: Sequence[int], remote: Sequence[int], timeout_s: float) -> None:
        self._check("write to", local, remote)
        if not remote:
            return
        packed = pack_ids(remote)

        async def moves() -> None:
            end_s = _now_s() + timeout_s
            async with self._channel() as channel:
                await channel.say(Write(packed, end_s - _now_s()))
                await channel.expect(Ready)
                await tcp_socket.send(channel.sock, tcp_socket.spans(self._pool, local))
                await channel.expect(Done)

        await self._run("write to", timeout_s, moves)

    async def notify(self, message: bytes, timeout_s: float) -> None:
        async def tells() -> None:
            async with self._channel() as channel:
                await channel.say(Notify(message))
                await channel.expect(Done)

        await self._run("notify", timeout_s, tells)

    async def close(self) -> None:
        self._closed = True
        # A thread that has ended has closed everything.
        with contextlib.suppress(TransferFailed):
            await self._thread.call(self._tear())

    async def _tear(self) -> None:
        busy = set(self._busy)
        for task in busy:
            task.cancel()
        if busy:
            await asyncio.wait(busy)
        for channel in self._idle:
            channel.close()
        self._idle.clear()

    def _check(self, what: str, local: Sequence[int], remote: Sequence[int]) -> None:
        self._check_open(what)
        wrong = check_block_ids(self._pool, local, remote, self._num_remote)
        if wrong is not None:
            raise TransferFailed(f"{what} {self._peer_id}: {wrong}; nothing was moved")

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise TransferFailed(f"{what} {self._peer_id}: the link is closed")

    async def _run(self, what: str, timeout_s: float, work: Callable[[], Awaitable[T]]) -> T:
        self._check_open(what)

        async def tracked() -> T:
            task = asyncio.current_task()
            assert task is not None
            self._busy.add(task)
            try:
                return await work()
            finally:
                self._busy.discard(task)

        return await bounded(self._thread, f"{what} {self._peer_id}", timeout_s, tracked)

    @contextlib.asynccontextmanager
    async def _channel(self) -> AsyncIterator[Channel]:
        """Lend a connection; it is torn when the block raises, and kept for the next otherwise."""
        async with self._turns:
            channel = await self._take()
            try:
                yield channel
            except BaseException:
                channel.close()
                raise
            if self._closed:
                channel.close()
            else:
                self._idle.append(channel)

    async def _take(self) -> Channel:
        while self._idle:
            channel = self._idle.pop()
            if not tcp_socket.ended(channel.sock):
                return channel
            channel.close()
        channel, layout, num_blocks = await dial(self._door, NAME, self._our_id, self._peer_id)
        try:
            check_layouts(self._pool.layout, layout, self._peer_id)
        except LayoutMismatch:
            channel.close()
            raise
        self._num_remote = num_blocks
        return channel


class TcpTransport:
    """Moves blocks over TCP; see KvTransport. ``host`` is where peers reach this process."""

    def __init__(self, *, peer_id: str, host: str, on_notify: OnNotify) -> None:
        self._peer_id = peer_id
        self._host = host
        self._on_notify = on_notify
        self._thread = LoopThread(f"tcp transport of {peer_id}")
        self._pool: KvPool | None = None
        self._door: Door | None = None
        self._links: list[TcpLink] = []

    @property
    def name(self) -> str:
        return NAME

    async def start(self, pool: KvPool) -> None:
        owner = Owner(NAME, self._peer_id, os.urandom(TOKEN_BYTES), pool)
        serve = partial(serve_pool, pool, self._on_notify, self._thread.at_home)
        listener = Listener(self._thread, owner, serve)
        self._thread.start()
        try:
            await self._thread.call(listener.open(self._host))
        except BaseException:
            await self._thread.stop()
            raise
        self._pool = pool
        self._door = listener.door

    def card(self) -> TransportCard:
        if self._pool is None or self._door is None:
            raise TransportUnavailable("the tcp transport has not been started; start it first")
        return TransportCard(
            transport=NAME,
            peer_id=self._peer_id,
            layout=self._pool.layout,
            num_blocks=self._pool.num_blocks,
            address=msgspec.msgpack.encode(self._door),
        )

    async def connect(self, card: TransportCard, timeout_s: float) -> KvLink:
        if self._pool is None:
            raise TransferFailed(f"connect to {card.peer_id}: the tcp transport is not started")
        if card.transport != NAME:
            raise TransferFailed(
                f"connect to {card.peer_id}: it uses transport {card.transport}, this worker {NAME}; "
                "start both with the same --kv-transport"
            )
        check_layouts(self._pool.layout, card.layout, card.peer_id)
        door = read_door(card, Door)
        link = TcpLink(self._thread, self._pool, self._peer_id, card.peer_id, door)
        try:
            await link.open(timeout_s)
        except BaseException:  # also when nobody waits for it any more
            await link.close()
            raise
        self._links = [other for other in self._links if not other.closed]
        self._links.append(link)
        return link

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        self._links.clear()
        await self._thread.stop()


def _now_s() -> float:
    return asyncio.get_running_loop().time()

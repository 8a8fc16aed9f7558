"""Blocks by NIXL: one-sided reads and writes over its UCX, on one host or by RDMA.

Two things reach a peer. A connection of our own (``tcp_channel``) proves the card's token both
ways, brings the layout, carries notifications, and tells within a moment that the peer's process is
gone. A NIXL agent per link moves the bytes, and dies with them: closing it is the only way to be sure
that a transfer which was given up has stopped. After that the next operation makes both anew.

All calls of NIXL happen on a thread of the transport, in pieces of a few MiB. Only a transfer that
is under way is polled; an idle transport sleeps.

What holds for a writer that stands still: NIXL has no way to take a registration back from a peer,
so bytes that a stopped writer has not sent may land when it goes on. Give blocks that were open
to be written to somebody else only once the writer has ended its write, or is known to be dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import msgspec

from trtllm_workers.errors import TransferFailed, TransportUnavailable
from trtllm_workers.transfer import tcp_socket
from trtllm_workers.transfer.base import (
    KvLink,
    KvPool,
    OnNotify,
    check_block_ids,
    check_layouts,
)
from trtllm_workers.transfer.nixl_agent import Agent, Direction, load_bindings
from trtllm_workers.transfer.nixl_card import NixlDoor, check_wire, has_rdma, this_place
from trtllm_workers.transfer.tcp_channel import Channel, Listener, Owner, dial, read_door
from trtllm_workers.transfer.tcp_frames import TOKEN_BYTES, Done, Notify
from trtllm_workers.transfer.tcp_thread import LoopThread, bounded
from trtllm_workers.types import TransportCard

NAME: Final = "nixl"
# Through shared memory the call that starts a transfer copies the bytes itself: about 1 ms of them,
# so that other links, deadlines and cancellations get their turn.
_BYTES_PER_POST: Final = 4 * 1024 * 1024
# What is under way is first asked without a pause, then every millisecond (the clock of epoll).
_EAGER_S: Final = 0.002
_PAUSE_S: Final = 0.001

T = TypeVar("T")


class _Session:
    """A channel and an agent to one peer; both end together. Lives on the thread."""

    def __init__(self, channel: Channel, agent: Agent) -> None:
        self.channel = channel
        self.agent = agent
        self.turn = asyncio.Lock()  # of the channel
        self.torn = False

    def check(self) -> None:
        """Raise TransferFailed when the session has ended, or the peer's process."""
        if self.torn:
            raise TransferFailed("torn together with another operation on this link; try again")
        if tcp_socket.ended(self.channel.sock):
            raise TransferFailed("its process is gone")

    def tear(self) -> None:
        """End it; after that no byte of it moves. Safe twice."""
        self.torn = True
        self.channel.close()
        self.agent.close()


class NixlLink:
    """A way to one peer's pool; see KvLink. Made by NixlTransport.connect."""

    def __init__(
        self, thread: LoopThread, pool: KvPool, our_id: str, card: TransportCard, door: NixlDoor
    ) -> None:
        self._thread = thread
        self._pool = pool
        self._our_id = our_id
        self._peer_id = card.peer_id
        self._num_remote = card.num_blocks
        self._door = door
        self.closed = False
        # The rest is touched on the thread only.
        self._session: _Session | None = None
        self._opening = asyncio.Lock()
        self._busy: set[asyncio.Task[Any]] = set()

    @property
    def peer_id(self) -> str:
        return self._peer_id

    @property
    def wire(self) -> str:
        return "unknown"  # NIXL does not tell which of UCX's transports carries the bytes

    async def open(self, timeout_s: float) -> None:
        """Make the first session. Raises LayoutMismatch or TransferFailed."""

        async def opens() -> None:
            await self._ready()

        await self._run("connect to", timeout_s, opens)

    async def read(self, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> None:
        await self._move("read from", Direction.READ, local, remote, timeout_s)

    async def write(self, local: Sequence[int], remote: Sequence[int], timeout_s: float) -> None:
        await self._move("write to", Direction.WRITE, local, remote, timeout_s)

    async def _move(
        self,
        what: str,
        direction: Direction,
        local: Sequence[int],
        remote: Sequence[int],
        timeout_s: float,
    ) -> None:
        self._check(what, local, remote)
        if not remote:
            return
        per_post = max(1, _BYTES_PER_POST // self._pool.layout.block_bytes)

        async def moves() -> None:
            end_s = asyncio.get_running_loop().time() + timeout_s
            session = await self._ready()
            for first in range(0, len(remote), per_post):
                part = slice(first, first + per_post)
                session.check()
                try:
                    handle = session.agent.begin(direction, local[part], remote[part])
                except TransferFailed:
                    session.tear()
                    raise
                if handle is not None:
                    await _finish(session, handle, end_s)
                await asyncio.sleep(0)

        await self._run(what, timeout_s, moves)

    async def notify(self, message: bytes, timeout_s: float) -> None:
        async def tells() -> None:
            session = await self._ready()
            async with session.turn:
                session.check()
                try:
                    await session.channel.say(Notify(message))
                    await session.channel.expect(Done)
                except BaseException:
                    session.tear()
                    raise

        await self._run("notify", timeout_s, tells)

    async def close(self) -> None:
        self.closed = True
        # A thread that has ended has ended everything.
        with contextlib.suppress(TransferFailed):
            await self._thread.call(self._tear())

    async def _tear(self) -> None:
        if self._session is not None:
            self._session.tear()
        busy = set(self._busy)
        for task in busy:
            task.cancel()
        if busy:
            await asyncio.wait(busy)
        if self._session is not None:  # one that was being made
            self._session.tear()

    def _check(self, what: str, local: Sequence[int], remote: Sequence[int]) -> None:
        self._check_open(what)
        wrong = check_block_ids(self._pool, local, remote, self._num_remote)
        if wrong is not None:
            raise TransferFailed(f"{what} {self._peer_id}: {wrong}; nothing was moved")

    def _check_open(self, what: str) -> None:
        if self.closed:
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

    async def _ready(self) -> _Session:
        """Return the session, made anew when there is none or the peer has ended it."""
        async with self._opening:
            session = self._session
            if session is not None and not session.torn:
                if not tcp_socket.ended(session.channel.sock):
                    return session
                session.tear()
            self._session = session = await self._connect()
            return session

    async def _connect(self) -> _Session:
        channel, layout, num_blocks = await dial(self._door, NAME, self._our_id, self._peer_id)
        try:
            check_layouts(self._pool.layout, layout, self._peer_id)
            agent = Agent(load_bindings(), self._pool, self._our_id, serves=False)
            try:
                agent.meet(self._door.metadata, self._door.base, num_blocks)
            except BaseException:
                agent.close()
                raise
        except BaseException:
            channel.close()
            raise
        self._num_remote = num_blocks
        return _Session(channel, agent)


async def _finish(session: _Session, handle: int, end_s: float) -> None:
    """Push a transfer on until it is done; tear the session when that fails.

    When cancelled, what was begun is done first, if it can be by ``end_s``: it is little, and
    tearing costs the link its other operations. Raises TransferFailed when the peer's process ends.
    """
    loop = asyncio.get_running_loop()
    eager_until_s = loop.time() + _EAGER_S
    cancelled: asyncio.CancelledError | None = None
    try:
        while not session.agent.done(handle):
            if cancelled is not None and loop.time() >= end_s:
                raise cancelled
            try:
                await asyncio.sleep(0 if loop.time() < eager_until_s else _PAUSE_S)
            except asyncio.CancelledError as error:
                cancelled = error
            session.check()
    except BaseException:
        session.tear()
        raise
    if cancelled is not None:
        raise cancelled


class NixlTransport:
    """Moves blocks by NIXL; see KvTransport. ``host`` is where peers reach this process."""

    def __init__(self, *, peer_id: str, host: str, on_notify: OnNotify) -> None:
        self._peer_id = peer_id
        self._host = host
        self._on_notify = on_notify
        self._thread = LoopThread(f"nixl transport of {peer_id}")
        self._pool: KvPool | None = None
        self._agent: Agent | None = None
        self._door: NixlDoor | None = None
        self._links: list[NixlLink] = []

    @property
    def name(self) -> str:
        return NAME

    async def start(self, pool: KvPool) -> None:
        self._thread.start()
        try:
            await self._thread.call(self._open(pool))
        except BaseException:
            await self._thread.stop()
            raise
        self._pool = pool

    async def _open(self, pool: KvPool) -> None:
        bindings = load_bindings()
        owner = Owner(NAME, self._peer_id, os.urandom(TOKEN_BYTES), pool)
        listener = Listener(self._thread, owner, self._serve)
        await listener.open(self._host)
        self._agent = Agent(bindings, pool, self._peer_id, serves=True)
        door = listener.door
        self._door = NixlDoor(
            host=door.host,
            port=door.port,
            token=door.token,
            metadata=self._agent.metadata(),
            base=self._agent.base,
            place=this_place(),
            has_rdma=has_rdma(),
        )

    async def _serve(self, channel: Channel) -> None:
        """Pass on one peer's notifications until its connection ends."""
        while True:
            asked = await channel.expect(Notify)
            self._thread.at_home(partial(self._on_notify, channel.peer_id, asked.message))
            await channel.say(Done())

    def card(self) -> TransportCard:
        if self._pool is None or self._door is None:
            raise TransportUnavailable("the nixl transport has not been started; start it first")
        return TransportCard(
            transport=NAME,
            peer_id=self._peer_id,
            layout=self._pool.layout,
            num_blocks=self._pool.num_blocks,
            address=msgspec.msgpack.encode(self._door),
        )

    async def connect(self, card: TransportCard, timeout_s: float) -> KvLink:
        if self._pool is None:
            raise TransferFailed(f"connect to {card.peer_id}: the nixl transport is not started")
        if card.transport != NAME:
            raise TransferFailed(
                f"connect to {card.peer_id}: it uses transport {card.transport}, this worker {NAME}; "
                "start both with the same --kv-transport"
            )
        check_layouts(self._pool.layout, card.layout, card.peer_id)
        door = read_door(card, NixlDoor)
        assert self._door is not None
        check_wire(self._door, door, card.peer_id)
        link = NixlLink(self._thread, self._pool, self._peer_id, card, door)
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
        with contextlib.suppress(TransferFailed):
            await self._thread.call(self._end())
        await self._thread.stop()

    async def _end(self) -> None:
        if self._agent is not None:
            self._agent.close()

"""A link to one peer over UCX: deadlines, the end of a peer, and when bytes have stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from trtllm_workers.errors import TransferFailed
from trtllm_workers.transfer.base import KvPool, check_block_ids
from trtllm_workers.transfer.ucx_card import PeerProcess, UcxAddress
from trtllm_workers.transfer.ucx_native import Native, UcxError
from trtllm_workers.transfer.ucx_net_channel import NetBatch, NetChannel
from trtllm_workers.transfer.ucx_notify import Notifier
from trtllm_workers.transfer.ucx_worker import WINDOW, Batch, Channel, Server
from trtllm_workers.types import TransportCard

_TURN_S: Final = 0.02  # one operation drives the link that long before it looks about
_SHARED_MEMORY: Final = frozenset({"sysv", "posix", "cma", "xpmem", "knem", "self"})


_CONNECTING: Final = "connecting"
_NO_WAY: Final = "; is it up, and may its ports be reached? --kv-transport tcp needs one port only"

AnyChannel = Channel | NetChannel
AnyBatch = Batch | NetBatch


@dataclass(frozen=True, slots=True)
class LinkSetting:
    """What links of one transport share."""

    our_id: str
    native: Native
    options: Mapping[str, str]
    net_options: Mapping[str, str] | None  # None: no messages over the network
    pool: KvPool
    server: Server
    notifier: Notifier
    forget: Callable[[UcxLink], None]
    park: Callable[[Channel], None]


class UcxLink:
    """One peer's pool. A failed operation ends the connection; the next one makes a new one."""

    def __init__(self, setting: LinkSetting, card: TransportCard, peer: UcxAddress) -> None:
        self._setting = setting
        self._card = card
        self._peer = peer
        self._process = PeerProcess(peer)
        self._channel: AnyChannel | None = None
        # Everything of a channel happens on this thread; it starts with the first call.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"ucx-{card.peer_id}")
        self._opening = asyncio.Lock()
        self._turn = asyncio.Lock()  # operations take turns, a window each
        self._notify_endpoint: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._wire = "unknown"
        self._over_network = False
        self._closed = False

    @property
    def peer_id(self) -> str:
        return self._card.peer_id

    @property
    def wire(self) -> str:
        return self._wire

    async def open(self, timeout_s: float) -> None:
        """Connect and see that the peer answers. Raises TransferFailed."""
        await self._whole(lambda stop: self._open(timeout_s, stop))

    async def read(self, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> None:
        await self._move(local, remote, timeout_s, write=False)

    async def write(self, local: Sequence[int], remote: Sequence[int], timeout_s: float) -> None:
        await self._move(local, remote, timeout_s, write=True)

    async def notify(self, message: bytes, timeout_s: float) -> None:
        self._check_usable("notify")
        await self._whole(lambda stop: self._notify(message, timeout_s, stop))

    async def _notify(self, message: bytes, timeout_s: float, stop: asyncio.Event) -> None:
        if not self._over_network:
            await self._notify_beside(message, timeout_s)
            return
        deadline = asyncio.get_running_loop().time() + timeout_s
        channel = await self._open(timeout_s, stop)
        assert isinstance(channel, NetChannel)
        async with self._turn:
            self._check_usable("notify")
            start = partial(channel.start_notify, message)
            await self._settle("notify", channel, start, deadline, timeout_s)

    async def _notify_beside(self, message: bytes, timeout_s: float) -> None:
        notifier = self._setting.notifier
        try:
            if self._notify_endpoint is None:
                self._notify_endpoint = notifier.connect(self._peer.notify_worker)
            async with asyncio.timeout(timeout_s):
                await notifier.send(self._notify_endpoint, self._peer.token, message)
        except TimeoutError as error:
            self._end_notifying()
            raise self._failed("notify", f"not sent within {timeout_s:g} s") from error
        except UcxError as error:
            self._end_notifying()
            raise self._failed("notify", str(error)) from error

    def _end_notifying(self) -> None:
        if self._notify_endpoint is not None:
            self._setting.notifier.disconnect(self._notify_endpoint)
            self._notify_endpoint = None

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await self._end(channel)  # tasks that wait for its requests see it closed
        self._end_notifying()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._thread.shutdown()
        self._process.close()
        self._setting.forget(self)

    async def _move(
        self, local: Sequence[int], remote: Sequence[int], timeout_s: float, *, write: bool
    ) -> None:
        what = "write" if write else "read"
        self._check_usable(what)
        wrong = check_block_ids(self._setting.pool, local, remote, self._card.num_blocks)
        if wrong is not None:
            raise self._failed(what, f"{wrong}; nothing was moved")
        if local:
            mine, theirs = tuple(local), tuple(remote)
            await self._whole(lambda stop: self._copy(mine, theirs, timeout_s, write, stop))

    async def _copy(
        self,
        local: Sequence[int],
        remote: Sequence[int],
        timeout_s: float,
        write: bool,
        stop: asyncio.Event,
    ) -> None:
        deadline = asyncio.get_running_loop().time() + timeout_s
        channel = await self._open(timeout_s, stop)
        what = "write" if write else "read"
        pieces = channel.pieces(local, remote, self._setting.pool.layout.block_bytes)
        for window in pieces.windows(WINDOW):
            if stop.is_set():
                return  # cancelled, and nothing is under way
            async with self._turn:
                self._check_usable(what)
                left_s = max(deadline - asyncio.get_running_loop().time(), 0.0)
                start = partial(channel.start, window, write=write, within_s=left_s)
                await self._settle(what, channel, start, deadline, timeout_s)

    async def _open(self, timeout_s: float, stop: asyncio.Event) -> AnyChannel:
        """Return the connection, made anew when there is none. Raises TransferFailed."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        what = _CONNECTING
        async with self._opening:
            channel = self._channel
            if channel is not None:
                if not await self._broke_unseen(channel):
                    return channel
                if self._channel is channel:
                    self._channel = None
                await self._end(channel)
            self._check_usable(what)
            try:
                reached: AnyChannel = await self._run(self._reach)
            except self._setting.native.failures as error:
                raise self._failed(what, f"{error}{self._why_no_network()}") from error
            await self._settle(what, reached, reached.start_hello, deadline, timeout_s)
            if self._closed or not reached.hello_matches():
                await self._end(reached)
                self._check_usable(what)
                raise self._failed(what, "another process answers at its address")
            self._wire = _wire_name(reached.transports())
            self._channel = reached
            return reached

    def _reach(self) -> AnyChannel:
        """Return a connection over the best wire there is. Raises what ``Native.failures`` names."""
        use, pool = self._setting, self._setting.server.pinned
        self._over_network = False
        if use.net_options is None or not self._peer.net_worker:
            return Channel(use.native, use.options, pool, self._peer)
        try:
            with use.native.silence():
                return Channel(use.native, use.options, pool, self._peer)
        except use.native.failures:
            self._over_network = True
            return NetChannel(use.native, use.net_options, pool, self._peer, use.our_id)

    def _why_no_network(self) -> str:
        if self._setting.net_options is None:
            who = "this worker"
        elif not self._peer.net_worker:
            who = "it"
        else:
            return _NO_WAY
        return (
            f"; if it is up, there is neither shared memory nor RDMA between the two, and {who} does not "
            "take part in ucx over TCP (its host is a loopback address, or UCX_TLS or UCX_NET_DEVICES leave "
            "it out): use --kv-transport tcp"
        )

    async def _broke_unseen(self, channel: AnyChannel) -> bool:
        """Return whether a connection between hosts has ended while nothing moved."""
        return isinstance(channel, NetChannel) and bool(await self._run(channel.broken))

    async def _settle(
        self,
        what: str,
        channel: AnyChannel,
        start: Callable[[], AnyBatch],
        deadline: float,
        timeout_s: float,
    ) -> None:
        """Start a batch and see it end. Raises TransferFailed, and then no byte moves any more."""
        loop = asyncio.get_running_loop()

        # A batch is driven by the channel that made it.
        drive: Callable[[Any, float], None] = channel.drive

        def begin() -> AnyBatch:
            batch = start()
            drive(batch, _TURN_S)
            return batch

        try:
            batch: AnyBatch = await self._run(begin)
            while not batch.ended:
                if self._process.gone():
                    raise self._failed(what, "its process has ended")
                if loop.time() >= deadline:
                    hint = _NO_WAY if what == _CONNECTING else ""
                    raise self._failed(what, f"not done within {timeout_s:g} s{hint}")
                turn_s = min(_TURN_S, max(deadline - loop.time(), 0.0))
                await self._run(partial(drive, batch, turn_s))
            if batch.failure:
                raise self._failed(what, batch.failure)
        except BaseException as error:
            if self._channel is channel:
                self._channel = None
            await self._end(channel)
            if isinstance(error, UcxError):
                raise self._failed(what, str(error)) from error
            raise

    async def _end(self, channel: AnyChannel) -> None:
        """End a connection: no byte moves over it afterwards."""
        alive = not self._process.gone()
        ended = await self._run(partial(channel.close, peer_lives=alive))
        if not ended and isinstance(channel, Channel):
            self._setting.park(channel)

    async def _whole(self, start: Callable[[asyncio.Event], Awaitable[object]]) -> None:
        """Run an operation to its end even when our caller is cancelled meanwhile."""
        stop = asyncio.Event()

        async def run() -> None:
            await start(stop)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            stop.set()
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # told to nobody: the caller is cancelled
            raise

    async def _run(self, call: Callable[[], Any]) -> Any:
        """Call on the link's thread; what was called has ended when this ends."""
        calling = asyncio.get_running_loop().run_in_executor(self._thread, call)
        try:
            return await asyncio.shield(calling)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                await calling
            raise

    def _check_usable(self, what: str) -> None:
        if self._closed:
            raise self._failed(what, "this link is closed")
        if self._process.gone():
            raise self._failed(what, "its process has ended")

    def _failed(self, what: str, why: str) -> TransferFailed:
        return TransferFailed(f"ucx {what} with {self.peer_id}: {why}")


def _wire_name(transports: Sequence[str]) -> str:
    if not transports:
        return "unknown"
    names = {"shm" if name in _SHARED_MEMORY else name for name in transports}
    return "+".join(sorted(names))

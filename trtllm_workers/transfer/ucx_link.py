"""A link to one peer over UCX: deadlines, the end of a peer, and when bytes have stopped."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from trtllm_workers.errors import TransferFailed
from trtllm_workers.transfer.base import KvPool, check_block_ids
from trtllm_workers.transfer.ucx_card import PeerProcess, UcxAddress
from trtllm_workers.transfer.ucx_native import OK, UcxError
from trtllm_workers.transfer.ucx_notify import Notifier
from trtllm_workers.transfer.ucx_worker import WINDOW, Batch, Channel, DataWorker
from trtllm_workers.types import TransportCard

_LOOK_S: Final = 0.001  # between two looks at requests under way
_STOP_S: Final = 5.0  # for requests to end after their endpoint was closed by force
_SHARED_MEMORY: Final = frozenset({"sysv", "posix", "cma", "xpmem", "knem", "self"})


@dataclass(frozen=True, slots=True)
class LinkSetting:
    """What links of one transport share. ``quick`` starts requests; ``slow`` opens and closes."""

    pool: KvPool
    data: DataWorker
    notifier: Notifier
    quick: Executor
    slow: Executor
    forget: Callable[[UcxLink], None]


class UcxLink:
    """One peer's pool. A failed operation ends the connection; the next one makes a new one."""

    def __init__(self, setting: LinkSetting, card: TransportCard, peer: UcxAddress) -> None:
        self._setting = setting
        self._card = card
        self._peer = peer
        self._process = PeerProcess(peer)
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._notify_endpoint: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._wire = "unknown"
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
        await self._whole(lambda _stop: self._notify(message, timeout_s))

    async def _notify(self, message: bytes, timeout_s: float) -> None:
        notifier = self._setting.notifier
        try:
            if self._notify_endpoint is None:
                self._notify_endpoint = notifier.connect(self._peer.notify_worker)
            async with asyncio.timeout(timeout_s):
                await notifier.send(self._notify_endpoint, self._peer.token, message)
        except TimeoutError as error:  # before OSError, which it is
            self._notify_endpoint = None
            raise self._failed("notify", f"not sent within {timeout_s:g} s") from error
        except self._setting.data.native.failures as error:
            self._notify_endpoint = None
            raise self._failed("notify", str(error)) from error

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await self._run(channel.close)  # ends the requests that tasks still wait for
        if self._notify_endpoint is not None:
            self._setting.notifier.disconnect(self._notify_endpoint)
            self._notify_endpoint = None
        if self._tasks:
            await asyncio.wait(self._tasks)
        if channel is not None:
            channel.users += 1
            self._leave(channel)
        self._process.close()
        self._setting.forget(self)

    async def _move(
        self, local: Sequence[int], remote: Sequence[int], timeout_s: float, *, write: bool
    ) -> None:
        what = "write" if write else "read"
        self._check_usable(what)
        wrong = check_block_ids(self._setting.pool, local, remote)
        if wrong is None:
            outside = [block for block in remote if not 0 <= block < self._card.num_blocks]
            if outside:
                wrong = f"remote block {outside[0]} is outside its pool of {self._card.num_blocks}"
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
        channel.users += 1
        try:
            await self._copy_over(channel, local, remote, deadline, timeout_s, write, stop)
        finally:
            self._leave(channel)

    async def _copy_over(
        self,
        channel: Channel,
        local: Sequence[int],
        remote: Sequence[int],
        deadline: float,
        timeout_s: float,
        write: bool,
        stop: asyncio.Event,
    ) -> None:
        what = "write" if write else "read"
        loop = asyncio.get_running_loop()
        pieces = channel.pieces(local, remote, self._setting.pool.layout.block_bytes)
        for window in pieces.windows(WINDOW):
            if stop.is_set():
                return  # cancelled, and nothing is under way
            self._check_usable(what)
            starting = loop.run_in_executor(
                self._setting.quick, partial(channel.start, window, write=write)
            )
            try:
                batch = await asyncio.shield(starting)
            except UcxError as error:
                raise self._failed(what, str(error)) from error
            except asyncio.CancelledError:
                await self._stop(channel, await starting)
                raise
            await self._settle(what, channel, batch, deadline, timeout_s)

    async def _open(self, timeout_s: float, stop: asyncio.Event) -> Channel:
        """Return the connection, made anew when there is none. Raises TransferFailed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        async with self._opening:
            if self._channel is not None:
                return self._channel
            self._check_usable("connecting")
            data = self._setting.data
            try:
                channel: Channel = await self._run(lambda: Channel(data, self._peer))
            except data.native.failures as error:
                raise self._failed("connecting", str(error)) from error
            channel.users += 1
            try:
                hello = channel.start_hello()
                await self._settle("connecting", channel, hello, deadline, timeout_s)
                if not channel.hello_matches():
                    await self._run(channel.close)
                    raise self._failed("connecting", "another process answers at its address")
                self._wire = _wire_name(channel.transports())
                self._channel = channel
                return channel
            finally:
                self._leave(channel)

    async def _settle(
        self, what: str, channel: Channel, batch: Batch, deadline: float, timeout_s: float
    ) -> None:
        """Wait for the end of a batch. Raises TransferFailed, and then no byte moves any more."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                if batch.ended or (batch.flushed() and await self._run(batch.collect)):
                    break
                if self._process.gone():
                    raise self._failed(what, "its process has ended")
                if loop.time() >= deadline:
                    raise self._failed(what, f"not done within {timeout_s:g} s")
                await asyncio.sleep(_LOOK_S)
            if batch.status != OK:
                raise self._failed(what, channel_error(self._setting.data, batch.status))
        except BaseException as error:
            if not await self._stop(channel, batch):
                raise self._failed(
                    what,
                    f"{error}; {_STOP_S:g} s after closing the connection UCX has not ended all of "
                    "its requests, so local blocks of this operation may still change: do not use "
                    "them again",
                ) from error
            raise

    async def _stop(self, channel: Channel, batch: Batch) -> bool:
        """Close the connection by force; return whether all requests of the batch have ended."""
        loop = asyncio.get_running_loop()
        if self._channel is channel:
            self._channel = None
        await self._run(channel.close)
        deadline = loop.time() + _STOP_S
        while not batch.collect():
            if loop.time() >= deadline:
                self._setting.data.unfinished.append((channel, batch))
                return False
            await asyncio.sleep(_LOOK_S)
        return True

    def _leave(self, channel: Channel) -> None:
        """Count one operation less; the last one gives the keys of a closed channel back."""
        channel.users -= 1
        if channel.closed and channel.users == 0 and not self._setting.data.is_unfinished(channel):
            channel.forget()

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
        return await asyncio.get_running_loop().run_in_executor(self._setting.slow, call)

    def _check_usable(self, what: str) -> None:
        if self._closed:
            raise self._failed(what, "this link is closed")
        if self._process.gone():
            raise self._failed(what, "its process has ended")

    def _failed(self, what: str, why: str) -> TransferFailed:
        return TransferFailed(f"ucx {what} with {self.peer_id}: {why}")


def channel_error(data: DataWorker, status: int) -> str:
    """Return what to tell about a failed request."""
    return f"{data.native.describe(status)} (UCX status {status})"


def _wire_name(transports: Sequence[str]) -> str:
    if not transports:
        return "unknown"
    names = {"shm" if name in _SHARED_MEMORY else name for name in transports}
    return "+".join(sorted(names))

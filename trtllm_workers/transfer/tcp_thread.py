"""A thread with an event loop of its own, so that moving KV bytes never delays the tokens.

The thread owns every socket and handle of a transport: what it says has stopped, has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from trtllm_workers.errors import TransferFailed

T = TypeVar("T")


class LoopThread:
    """Runs coroutines beside the caller's event loop; ends with ``stop``, which is safe twice."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._home: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._end: asyncio.Event | None = None
        self._ended: asyncio.Future[None] | None = None
        # Between "is it stopping?" and the scheduling that relies on the answer.
        self._gate = threading.Lock()
        self._stopping = False
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        """Start the thread; call once, on the event loop that will use it."""
        self._home = asyncio.get_running_loop()
        self._ended = self._home.create_future()
        # The plain loop: it takes readers of our non-blocking sockets, whatever loop the caller has.
        self._loop = asyncio.SelectorEventLoop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._loop, self._end), name=self._name, daemon=True
        )
        self._thread.start()

    def _run(self, loop: asyncio.AbstractEventLoop, end: asyncio.Event) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._until(end))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            self.at_home(self._settle_end)

    async def _until(self, end: asyncio.Event) -> None:
        await end.wait()
        # Tasks may start others while they end.
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    def _settle_end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """Run ``work`` as a task owned by the thread; call on the thread. It must not raise."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def at_home(self, act: Callable[[], object]) -> None:
        """Call ``act`` on the event loop that started the thread; drop it when that loop is gone."""
        if self._home is not None:
            with contextlib.suppress(RuntimeError):
                self._home.call_soon_threadsafe(act)

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the thread and return its result.

        When cancelled, ``work`` is cancelled there and has ended before this raises. Raises
        TransferFailed when the thread ends first or has ended.
        """
        home = asyncio.get_running_loop()
        settled: asyncio.Future[asyncio.Task[T]] = home.create_future()
        begun: list[asyncio.Task[T]] = []
        cancelled = False

        def settle(task: asyncio.Task[T]) -> None:
            if not settled.done():
                settled.set_result(task)

        def ended(task: asyncio.Task[T]) -> None:
            with contextlib.suppress(RuntimeError):
                home.call_soon_threadsafe(settle, task)

        def begin() -> None:
            task = self.spawn(work)
            begun.append(task)
            task.add_done_callback(ended)

        def cancel() -> None:
            for task in begun:
                task.cancel()

        with self._gate:
            loop = self._loop
            if loop is None or self._stopping:
                work.close()
                raise TransferFailed(f"{self._name} is closed")
            loop.call_soon_threadsafe(begin)
        while not settled.done():
            try:
                await asyncio.shield(settled)
            except asyncio.CancelledError:
                cancelled = True
                with contextlib.suppress(RuntimeError):  # the thread has ended: so has the task
                    loop.call_soon_threadsafe(cancel)
        task = settled.result()
        if cancelled:
            if not task.cancelled():
                task.exception()  # seen; the caller asked for the end, and that is what it gets
            raise asyncio.CancelledError
        if task.cancelled():
            raise TransferFailed(f"{self._name} was closed meanwhile")
        return task.result()

    async def stop(self) -> None:
        """End all work and the thread; returns when it is gone."""
        with self._gate:
            first = not self._stopping
            self._stopping = True
            if self._loop is None or self._end is None:
                return
            if first:
                self._loop.call_soon_threadsafe(self._end.set)
        assert self._ended is not None
        assert self._thread is not None
        await asyncio.shield(self._ended)
        self._thread.join()


async def bounded(
    thread: LoopThread, what: str, timeout_s: float, work: Callable[[], Awaitable[T]]
) -> T:
    """Run ``work`` on the thread within ``timeout_s``; ``what`` names the operation and the peer.

    Raises TransferFailed for a broken connection and for the deadline too; ``work`` has ended then.
    """

    async def attempt() -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await work()
        except TimeoutError as error:
            raise TransferFailed(
                f"{what}: not done within {timeout_s:g} s; is the peer alive, and the network fast enough?"
            ) from error
        except TransferFailed as error:
            raise TransferFailed(f"{what}: {error}") from error
        except OSError as error:
            raise TransferFailed(
                f"{what}: {error.strerror or error}; is the peer alive?"
            ) from error

    return await thread.call(attempt())

"""Blocking calls of one load, in threads, that end before what they use is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from threading import Event
from typing import TypeVar

T = TypeVar("T")

# A call looks at ``stop`` between pieces of work of a few milliseconds; a disk may be slower.
_GRACE_S = 2.0


class Stopped(Exception):
    """A call was told to stop."""


class Work:
    """The calls of one load. Belongs to one event loop.

    ``undo``, given to ``fail``, is called exactly once, and never while a call runs: memory that threads
    write to, and descriptors that they read, stay until they have ended.
    """

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._stop = Event()
        self._running: set[asyncio.Future[object]] = set()

    def check(self) -> None:
        """Raise Stopped when it is time to stop; for the calls."""
        if self._stop.is_set():
            raise Stopped

    async def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run ``calls`` at once and return what they returned; the first error ends the others."""
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._threads, call) for call in calls]
        for future in futures:
            self._running.add(future)  # type: ignore[arg-type]
            future.add_done_callback(self._running.discard)
        try:
            done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            if not all(future.done() for future in futures):
                self._stop.set()
                await asyncio.wait(futures, timeout=_GRACE_S)
            for future in futures:  # an error that nobody asked for would be logged
                if future.done() and not future.cancelled():
                    future.exception()

    def fail(self, undo: Callable[[], None]) -> None:
        """Stop all calls; call ``undo`` now, or as soon as none runs."""
        self._stop.set()
        if not self._running:
            undo()
            return

        def ended(_future: asyncio.Future[object]) -> None:
            if not self._running:
                undo()

        for future in self._running:
            future.add_done_callback(ended)

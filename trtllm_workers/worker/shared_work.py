"""One piece of work that several wait for, and that ends when the last of them leaves. Knows no image."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SharedWork(Generic[T]):
    """A task with a result that its waiters use while they are in ``joined()``.

    * ``over`` resolves with the result or the error. It belongs to all: wait for it with ``asyncio.wait``.
    * When the last waiter leaves, the result is given to ``let_go``, once; work that still runs is
      cancelled, unless it is ``fixed`` (a thread does it): then it ends by itself, and may be joined again.
    * ``forget`` is called, perhaps more than once, when nobody can join any more.
    """

    def __init__(self, let_go: Callable[[T], None], forget: Callable[[], None]) -> None:
        self.over: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.over.add_done_callback(lambda over: over.cancelled() or over.exception())
        self.fixed = False
        self.task: asyncio.Task[T] | None = None
        self._let_go = let_go
        self._forget = forget
        self._num_waiting = 0
        self._left = False

    def start(self, work: Coroutine[Any, Any, T], name: str) -> None:
        """Begin; call it once."""
        self.task = asyncio.create_task(work, name=name)
        self.task.add_done_callback(self._ended)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be one of those who wait, and then one of those who use the result."""
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._unwanted()

    def fail(self, error: Exception) -> None:
        """Tell everybody who waits that nothing will come of it; the work ends as soon as it can."""
        if not self.over.done():
            self._forget()
            self.over.set_exception(error)
            if self.task is not None and not self.fixed:
                self.task.cancel()

    def _ended(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.over.cancel()
        elif (error := task.exception()) is not None:
            if not self.over.done():
                self.over.set_exception(error)
        elif self.over.done():
            self._let_go(task.result())
        else:
            self.over.set_result(task.result())
        if not self._num_waiting:
            self._unwanted()

    def _unwanted(self) -> None:
        if not self.over.done():
            if not self.fixed:
                self._forget()
                if self.task is not None:
                    self.task.cancel()
            return
        self._forget()
        if not self._left and not self.over.cancelled() and self.over.exception() is None:
            self._left = True
            self._let_go(self.over.result())

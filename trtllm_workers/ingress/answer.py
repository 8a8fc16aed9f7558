"""All choices of one HTTP request, and how they end. Knows no HTTP and no text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from trtllm_workers.errors import LaunchError
from trtllm_workers.ingress.choice import Choice
from trtllm_workers.ingress.responses import Usage
from trtllm_workers.ingress.served import Worker
from trtllm_workers.ingress.streams import Streams

Move = Callable[["Answer", Choice, Worker | None, LaunchError], bool]
T = TypeVar("T")


class Answer:
    """Owner of the choices of one request, and of the work that some of them wait for.

    It is not over before all its choices were ``sent``. ``move(answer, choice, worker, error)`` is asked
    whether a choice that ``worker`` failed can go on elsewhere. ``client_field`` tells what the client calls a field that a worker found fault with.
    ``wake`` is called when nothing more will come: all choices ended, or ``failure``.
    """

    def __init__(
        self,
        streams: Streams,
        wake: Callable[[], None],
        move: Move,
        client_field: Callable[[str], str] = str,
    ) -> None:
        self._streams = streams
        self._wake = wake
        self._move = move
        self._client_field = client_field
        self.choices: list[Choice] = []
        self.prompt_tokens = 0
        self.choices_per_prompt = 1
        self.failure: LaunchError | None = None
        self.cause = ""
        self.timer: asyncio.TimerHandle | None = None
        self._running = 0
        self._sent = False
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Begin work that ends with the answer at the latest; when it has ended, ``wake`` is called."""
        task = asyncio.create_task(work, name=name)
        self._tasks.append(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.remove(task)
        self._wake()

    async def end_work(self) -> None:
        """Stop what was started and wait until it has ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)

    def sent(self) -> None:
        """Take notice that all choices are on their way."""
        self._sent = True

    def add(self, choice: Choice) -> None:
        """Add a choice that is about to be sent to a worker."""
        self.choices.append(choice)
        self._running += 1

    @property
    def over(self) -> bool:
        """True when nothing more will come."""
        return (self._running == 0 and self._sent) or self.failure is not None

    @property
    def running(self) -> int:
        """How many choices have not ended."""
        return self._running

    def choice_ended(self, choice: Choice, *, engine_runs: bool) -> None:
        """Take notice that a choice is complete."""
        if engine_runs:
            self._streams.abort((choice,))
        else:
            self._streams.release(choice)
        self._running -= 1
        if self._running == 0:
            self._wake()

    def choice_failed(self, choice: Choice, error: LaunchError, *, engine_runs: bool) -> None:
        """Move a choice to another worker, or let the whole answer fail."""
        worker = self._streams.worker_of(choice)
        if engine_runs:
            self._streams.abort((choice,))
        else:
            self._streams.drop(choice)
        if self.failure is None and not self._move(self, choice, worker, error):
            self.worker_failed(error)

    def worker_failed(self, error: LaunchError) -> None:
        """End the answer with what a worker said, in the client's words."""
        if error.param is not None:
            error.param = self._client_field(error.param)
        self.fail(error, cause="worker_failed")

    def fail(self, error: LaunchError, *, cause: str) -> None:
        """End the answer with an error; what still runs is aborted."""
        if self.over:
            return
        self.failure = error
        self.cause = cause
        self._streams.abort(self.choices)
        self._wake()

    def abandon(self, cause: str) -> None:
        """Abort what still runs, in one frame per worker."""
        if self._streams.abort(self.choices) and not self.cause:
            self.cause = cause

    def usage(self) -> Usage:
        """Return the usage so far."""
        # The choices of a prompt share its cached prefix: it is told once, as the first saw it.
        first = self.choices[:: self.choices_per_prompt]
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
            cached_tokens=sum(choice.cached_tokens for choice in first),
        )

"""Results as they grow: one object per request, changed in place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from ..llmapi.disaggregated_params import DisaggregatedParams


@dataclass(slots=True)
class Logprob:
    """One token's logprob and its rank, 1 being the likeliest."""

    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class Response:
    """What the executor says of one request at once."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[Any] | None = None
    cached_tokens: int = 0
    disaggregated_params: DisaggregatedParams | None = None
    error: BaseException | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(slots=True)
class CompletionOutput:
    """One answer so far."""

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    disaggregated_params: DisaggregatedParams | None = None
    _last_len: int = 0

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    @property
    def token_ids_diff(self) -> list[int]:
        """Tokens of the last step."""
        return self.token_ids[self._last_len :]


class RequestOutput:
    """A request's result: awaitable, and iterable from the loop it was made on.

    Every iteration gives this same object.
    """

    def __init__(
        self, request_id: int, prompt_token_ids: list[int], abort: Callable[[int], None]
    ) -> None:
        self.request_id = request_id
        self.prompt: str | None = None
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput()]
        self.finished = False
        self.cached_tokens = 0
        self.decoding_iter = 0
        self.metrics_dict: dict[str, Any] = {}
        self.context_logits = None
        self.mm_embedding_handle: dict[str, Any] | None = None
        self.disaggregated_params: DisaggregatedParams | None = None
        self._abort = abort
        self._aborted = False
        self._done = threading.Event()
        try:
            self.loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
            self._queue: asyncio.Queue[Response] | None = asyncio.Queue()
        except RuntimeError:
            self.loop = self._queue = None
        self._responses: list[Response] = []

    # --- the executor's side: on the loop, or in its thread when there is none -----------------

    def put(self, response: Response) -> None:
        """Take what the executor says."""
        if self._queue is not None:
            self._queue.put_nowait(response)
        else:
            self._handle(response)
        if response.is_final:
            self._done.set()

    # --- the user's side --------------------------------------------------------------------------

    def abort(self) -> None:
        """Ask for the end; a last response says so."""
        self._aborted = True
        self._abort(self.request_id)

    def aborted(self) -> bool:
        """Whether the end was asked for."""
        return self._aborted

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait in a thread."""
        if not self._done.wait(timeout):
            raise TimeoutError
        return self

    async def aresult(self) -> RequestOutput:
        """Wait on the loop."""
        while not self.finished:
            await self._step()
        return self

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        await self._step()
        return self

    async def _step(self) -> None:
        assert self._queue is not None, "The asyncio event loop must be running at creation"
        self._handle(await self._queue.get())

    def _handle(self, response: Response) -> None:
        if response.error is not None:
            self.finished = True
            raise response.error
        output = self.outputs[0]
        output._last_len = len(output.token_ids)
        output.token_ids.extend(response.token_ids)
        if response.logprobs is not None:
            output.logprobs = [*(output.logprobs or []), *response.logprobs]
        output.finish_reason = response.finish_reason
        output.stop_reason = response.stop_reason
        self.cached_tokens = response.cached_tokens
        self.decoding_iter += 1
        if response.disaggregated_params is not None:
            output.disaggregated_params = response.disaggregated_params
            self.disaggregated_params = response.disaggregated_params
        self.finished = response.is_final


class IterationResult:
    """Statistics or events: one object for an engine's whole life, for one reader.

    It ends after ``timeout`` seconds without data; only a new prompt lets it go on.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done = False
        self._timeout = 2.0
        self._early: list[Any] = []

    def set_timeout(self, timeout: float) -> None:
        """How long a reader waits."""
        self._timeout = timeout

    def mark_undone(self) -> None:
        """A prompt was submitted: there may be data again. Binds to the loop that submitted."""
        self._done = False
        if self._loop is None:
            try:
                self._loop = asyncio.get_running_loop()
                self._queue = asyncio.Queue()
            except RuntimeError:
                return
            early, self._early = self._early, []
            self._put(early)

    def put_from_thread(self, items: list[Any]) -> None:
        """Take data from the executor's thread."""
        if self._loop is None:
            self._early += items
            return
        try:
            self._loop.call_soon_threadsafe(self._put, items)
        except RuntimeError:
            return  # the loop has ended

    def _put(self, items: list[Any]) -> None:
        assert self._queue is not None, "bound by mark_undone"
        for item in items:
            self._queue.put_nowait(item)

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> Any:
        if self._done or self._queue is None:
            raise StopAsyncIteration
        assert asyncio.get_running_loop() is self._loop, "consumed on another loop"
        try:
            return await asyncio.wait_for(self._queue.get(), self._timeout)
        except TimeoutError:
            self._done = True
            raise StopAsyncIteration from None

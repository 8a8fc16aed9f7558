"""The torch engine on the event loop: the contract's side of ``runner.py``. Knows no tensor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec

from trtllm_workers.engines.acceptance import (
    check_filled,
    check_request,
    pin_media,
    unpin_media,
)
from trtllm_workers.engines.base import (
    Deliver,
    DeliverPrefilled,
    DeliverReservation,
    EngineOptions,
    ImageEncoder,
)
from trtllm_workers.engines.event_log import KvEventLog
from trtllm_workers.engines.torch.accept import check_first, check_grids, rows_of
from trtllm_workers.engines.torch.core import Result
from trtllm_workers.engines.torch.encoding import EncodingEngine
from trtllm_workers.engines.torch.orders import Abort, Add, PrefillReserved, Release, Resume
from trtllm_workers.engines.torch.runner import Outcome, Runner, Started
from trtllm_workers.engines.torch.sequence import Purpose, Rows
from trtllm_workers.engines.torch.streams import HELD, Phase, Stream, reason_of
from trtllm_workers.engines.torch.vision.loading import Vision
from trtllm_workers.errors import EngineDead, EngineError, LaunchError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    KvEvent,
    Prefilled,
    TokenChunk,
)

log = get_logger(__name__)

# A step takes seconds at most, also on a slow CPU; a thread that outlives this hangs in a kernel.
_CLOSE_TIMEOUT_S = 60.0


def build(options: EngineOptions) -> TorchEngine | EncodingEngine:
    """Build a torch engine; nothing is read before ``start``."""
    return TorchEngine(options) if options.generates else EncodingEngine(options)


class TorchEngine:
    """See ``engines/base.py: Engine`` for the guarantees. All methods belong to one event loop.

    A request without a seed draws one on each side of a handoff: its tokens are as random as ever, but
    not those it would have drawn at one place.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._chunked_prefill: bool = options.config["enable_chunked_prefill"]
        self._runner: Runner | None = None
        self._info: EngineInfo | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._streams: dict[str, Stream] = {}
        self._events = KvEventLog()
        self._stats = EngineStats()
        self._kv_pool: KvPool | None = None
        self._vision: Vision | None = None
        self._questions: set[asyncio.Future[Mapping[str, int]]] = set()
        self._num_streams = 0
        self._num_submitted = 0
        self._num_taken = 0
        self._late_aborts = 0
        self._death: EngineDead | None = None
        self._has_died = asyncio.Event()
        self._closed = False

    async def start(self) -> EngineInfo:
        if self._closed or self._runner is not None:
            raise EngineDead("this engine was started or closed before; build another")
        loop = self._loop = asyncio.get_running_loop()
        started: asyncio.Future[Started] = loop.create_future()
        ended = self._ended = loop.create_future()
        self._runner = Runner(
            self._options,
            started=lambda result: self._call(_settle, started, result),
            post=lambda outcome: self._call(self._apply, outcome),
            ended=lambda: self._call(_settle, ended, None),
        )
        result = await started
        if isinstance(result, LaunchError):
            raise result
        self._info = result.info
        self._kv_pool = result.kv_pool
        self._vision = result.vision
        return result.info

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        self._accept(request, deliver, Purpose.GENERATE)

    def prefill(self, request: GenerateRequest, deliver: DeliverPrefilled) -> None:
        self._accept(request, deliver, Purpose.PREFILL)

    def reserve(self, request: GenerateRequest, deliver: DeliverReservation) -> None:
        self._accept(request, deliver, Purpose.RESERVE)

    def release(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is not None and stream.phase is Phase.PINNED and self._runner is not None:
            self._forget(stream)
            self._runner.order(Release(stream))

    def resume(
        self, request_id: str, first: TokenChunk | None, deliver: Deliver, opaque: bytes = b""
    ) -> None:
        runner, info, loop = self._alive(request_id)
        stream = self._reserved(request_id)
        if first is not None:
            check_first(stream.request, first, info)
        rows = self._pin(stream) if first is None else ()
        stream.deliver = deliver
        stream.phase = Phase.STREAMING
        if first is not None:
            # Not through the thread: the first token need not wait for the step at hand. Before the
            # order: what the thread makes of that is called after this.
            loop.call_soon(self._deliver, stream, first)
        runner.order(Resume(stream, first, rows))

    def prefill_reserved(
        self, request_id: str, num_filled_blocks: int, deliver: DeliverPrefilled
    ) -> None:
        runner, info, _loop = self._alive(request_id)
        stream = self._reserved(request_id)
        check_filled(stream.request, num_filled_blocks, info.block_size)
        rows = self._pin(stream)
        stream.deliver = deliver
        stream.phase = Phase.PREFILLING
        runner.order(PrefillReserved(stream, num_filled_blocks, time.monotonic(), rows))

    def abort(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is None or self._runner is None or stream.aborted:
            return
        stream.aborted = True
        if stream.phase in HELD:
            self._forget(stream)
        self._runner.order(Abort(stream))

    @property
    def kv_pool(self) -> KvPool | None:
        return self._kv_pool

    @property
    def media_store(self) -> MediaStore | None:
        return None if self._vision is None else self._vision.store

    @property
    def encoder(self) -> ImageEncoder | None:
        return None if self._vision is None else self._vision.encoder

    async def holdings(self) -> Mapping[str, int]:
        if self._loop is None or self._runner is None or self._closed or self._death is not None:
            return {}
        answer: asyncio.Future[Mapping[str, int]] = self._loop.create_future()
        self._questions.add(answer)
        try:
            self._runner.ask_holdings(lambda held: self._call(_settle, answer, held))
            return await answer
        finally:
            self._questions.discard(answer)

    def kv_events(self) -> AsyncIterator[KvEvent]:
        return self._events.follow()

    def stats(self) -> EngineStats:
        stats = self._stats
        return msgspec.structs.replace(
            stats,
            num_waiting=stats.num_waiting + self._num_submitted - self._num_taken,
            aborts=stats.aborts + self._late_aborts,
            finished=stats.finished - self._late_aborts,
        )

    async def died(self) -> EngineDead:
        await self._has_died.wait()
        assert self._death is not None  # set before the event
        return self._death

    async def close(self) -> None:
        self._closed = True
        runner, ended = self._runner, self._ended
        if runner is None or ended is None:
            self._events.close()
            return
        runner.stop()
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await asyncio.shield(ended)
        except TimeoutError:
            runner.give_up()
            raise EngineDead(
                f"the torch engine's thread did not end within {_CLOSE_TIMEOUT_S:.0f} s; "
                "it hangs in a computation, and only the end of the process will end it"
            ) from None
        runner.join()
        self._runner = None
        self._kv_pool = None
        self._end_open(TokenChunk((), finish_reason=FinishReason.ABORT))
        self._vision = None
        self._events.close()

    # --- on the loop ---------------------------------------------------------------------------

    def _alive(self, request_id: str) -> tuple[Runner, EngineInfo, asyncio.AbstractEventLoop]:
        """Return what a serving engine has. Raises EngineDead for one that does not serve."""
        if self._death is not None:
            raise EngineDead(str(self._death))
        if self._closed or self._info is None or self._runner is None or self._loop is None:
            state = "is closed" if self._closed else "has not started"
            raise EngineDead(f"request {request_id}: the torch engine {state}")
        return self._runner, self._info, self._loop

    def _reserved(self, request_id: str) -> Stream:
        stream = self._streams.get(request_id)
        if stream is None or stream.phase is not Phase.RESERVED:
            raise EngineError(
                f"request {request_id}: holds no reservation here (any more); reserve it again"
            )
        return stream

    def _accept(
        self, request: GenerateRequest, deliver: Callable[[Any], None], purpose: Purpose
    ) -> None:
        runner, info, _loop = self._alive(request.request_id)
        check_request(request, info, chunked_prefill=self._chunked_prefill, running=self._streams)
        check_grids(request)
        self._num_streams += 1
        stream = Stream(request, deliver, purpose, self._num_streams)
        rows = () if purpose is Purpose.RESERVE else self._pin(stream)
        self._streams[request.request_id] = stream
        self._num_submitted += 1
        runner.order(Add(stream, request, purpose, stream.arrived_s, rows))

    def _pin(self, stream: Stream) -> Rows:
        """Hold the images of a prompt that is to be computed; return where their rows lie.

        Raises EngineError, holding none, when one is not here.
        """
        request, vision = stream.request, self._vision
        if vision is None or not request.media:
            return ()
        entries = pin_media(request, vision.store)
        try:
            rows = rows_of(request, entries, vision.store)
        except EngineError:
            unpin_media(vision.store, entries)
            raise
        stream.pinned = entries
        return rows

    def _forget(self, stream: Stream) -> None:
        """Let go of what a stream has here; the engine's thread reads none of it any more."""
        del self._streams[stream.request.request_id]
        if stream.pinned and self._vision is not None:
            unpin_media(self._vision.store, stream.pinned)
        stream.pinned = ()

    # --- from the engine thread ----------------------------------------------------------------

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Run ``function`` on the loop; called in the engine thread."""
        assert self._loop is not None  # set before the thread starts
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop ended without closing the engine: nobody is left to be told.
            if self._runner is not None:
                self._runner.stop()

    def _apply(self, outcome: Outcome) -> None:
        """Take over what one step made: cache changes and stats first, then the chunks."""
        if self._runner is not None:
            self._runner.applied()
        self._stats = outcome.stats
        self._num_taken = outcome.num_taken
        self._events.apply(outcome.changes)
        if outcome.death is not None:
            self._death = outcome.death
        for stream, result in outcome.results:
            self._deliver(stream, result)
        if outcome.death is not None:
            self._bury(outcome.death)

    def _deliver(self, stream: Stream, result: Result) -> None:
        if self._streams.get(stream.request.request_id) is not stream:
            return  # held until it was released or aborted; nobody waits for word of it
        reason = reason_of(result)
        if reason is not None:
            self._forget(stream)
        if stream.aborted and reason is not FinishReason.ERROR:
            # The thread runs ahead of a loop that is late: its backlog is not for this stream.
            if reason is None:
                return
            if reason is not FinishReason.ABORT:
                self._late_aborts += 1  # it had ended by itself, unseen
            chunk = result.first if isinstance(result, Prefilled) else result
            cached_tokens = chunk.cached_tokens if isinstance(chunk, TokenChunk) else 0
            result = TokenChunk((), FinishReason.ABORT, cached_tokens)
        try:
            stream.tell(result)
        except Exception as error:  # noqa: BLE001 - a consumer's fault; the others get theirs
            assert self._loop is not None  # set before the first step
            self._loop.call_exception_handler(
                {
                    "message": f"request {stream.request.request_id}: its consumer raised",
                    "exception": error,
                }
            )
            self.abort(stream.request.request_id)

    def _bury(self, death: EngineDead) -> None:
        """End streams the thread had not taken yet and wake those who wait for the death."""
        self._end_open(
            TokenChunk(
                (),
                finish_reason=FinishReason.ERROR,
                error_code=EngineDead.code,
                error_message=str(death),
            )
        )
        self._has_died.set()

    def _end_open(self, last: TokenChunk) -> None:
        """End what came while the thread was ending, and questions it did not answer."""
        self._num_submitted = self._num_taken
        for stream in list(self._streams.values()):
            self._deliver(stream, last)
        for answer in self._questions:
            _settle(answer, {})


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)

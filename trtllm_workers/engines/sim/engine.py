"""The sim engine: the scheduler's steps on the event loop's clock. Knows no model and no thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trtllm_workers.blocks import root_hash
from trtllm_workers.config.vision_model import read_vision
from trtllm_workers.engines.acceptance import check_request, pin_media, unpin_media
from trtllm_workers.engines.base import (
    Deliver,
    DeliverPrefilled,
    DeliverReservation,
    EngineOptions,
    ImageEncoder,
)
from trtllm_workers.engines.sim.checkpoint import read_checkpoint
from trtllm_workers.engines.sim.cost import CostModel, load_cost
from trtllm_workers.engines.sim.handoffs import Handoffs
from trtllm_workers.engines.sim.images import SimEncoder
from trtllm_workers.engines.sim.kv_memory import ORDER, map_pool
from trtllm_workers.engines.sim.pool import BlockPool
from trtllm_workers.engines.sim.scheduler import OnHeld, Scheduler
from trtllm_workers.engines.sim.step import Limits, Step
from trtllm_workers.engines.sim.stream import Phase, Purpose, Stream, nothing_held
from trtllm_workers.engines.sim.tokens import Vocabulary
from trtllm_workers.errors import ConfigError, EngineDead, EngineError, NotSupported
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.media_store import MediaStore, byte_store
from trtllm_workers.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    KvEvent,
    KvLayout,
    Prefilled,
    Reservation,
    TokenChunk,
)

# top_p is accepted because every load test sends it; made-up tokens have no probabilities to cut.
CAPABILITIES = (
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
)
# A loop that stood still for longer (a laptop that slept) begins a new schedule.
_MAX_LATENESS_S = 1.0


@dataclass(frozen=True, slots=True)
class _Started:
    """What a started engine works with."""

    info: EngineInfo
    cost: CostModel
    limits: Limits
    vocabulary: Vocabulary
    pool: BlockPool
    handoffs: Handoffs
    scheduler: Scheduler
    loop: asyncio.AbstractEventLoop


def build(options: EngineOptions) -> SimEngine:
    """Build a sim engine; nothing is read before ``start``."""
    return SimEngine(options)


class SimEngine:
    """See ``engines/base.py: Engine`` for the guarantees.

    A step takes what the cost model says, counted from when the one before it was due and not from
    when that was noticed, so the pace has no drift. Lost time is made up without a burst: no step
    takes less than half its time, until the schedule is met again.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._started: _Started | None = None
        self._memory: KvPool | None = None
        self._media: MediaStore | None = None
        self._encoder: SimEncoder | None = None
        self._timer: asyncio.Handle | None = None
        self._step: Step | None = None
        self._firsts: list[tuple[Stream, TokenChunk]] = []  # of resumed streams, not delivered yet
        self._due_s = 0.0
        self._num_accepted = 0
        self._death: EngineDead | None = None
        self._has_died = asyncio.Event()
        self._closed = False

    async def start(self) -> EngineInfo:
        config = self._options.config
        cost_path = self._options.extra.get("cost_path")
        cost = load_cost(Path(cost_path)) if cost_path else CostModel()
        checkpoint = read_checkpoint(self._options.model_path)
        block_size: int = config["kv_cache_config.tokens_per_block"]
        num_blocks = config["kv_cache_config.max_tokens"] // block_size
        if num_blocks < 1:
            raise ConfigError(
                f"kv_cache_config.max_tokens {config['kv_cache_config.max_tokens']} "
                f"({config.source('kv_cache_config.max_tokens')}) is less than one block of "
                f"{block_size} tokens (kv_cache_config.tokens_per_block); raise it",
                param="kv_cache_config.max_tokens",
            )
        limits = Limits(
            block_size=block_size,
            # Each running stream needs at least one token of a step.
            max_running=min(config["max_batch_size"], config["max_num_tokens"]),
            max_num_tokens=config["max_num_tokens"],
            chunked_prefill=config["enable_chunked_prefill"],
            reuse=config["kv_cache_config.enable_block_reuse"],
        )
        layers, heads, head_dim = checkpoint.kv_shape
        layout = KvLayout(
            num_layers=layers,
            num_kv_heads=heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype="uint8",
            order=ORDER,
            block_bytes=cost.kv_block_bytes,
        )
        eos = checkpoint.eos_token_ids
        model = read_vision(self._options.model_path)
        vision = None if model is None else model.info(model.dtype, encodes=self._options.encodes)
        info = EngineInfo(
            kv_events=True,
            engine="sim",
            model_path=str(self._options.model_path),
            model_id=checkpoint.model_id,
            block_size=block_size,
            num_blocks=num_blocks,
            # No table of positions here: a longer max_seq_len than the model's is allowed.
            max_seq_len=config["max_seq_len"] or checkpoint.max_positions,
            max_batch_size=limits.max_running,
            max_num_tokens=limits.max_num_tokens,
            vocab_size=checkpoint.vocab_size,
            eos_token_ids=eos,
            capabilities=CAPABILITIES,
            layout=layout,
            tensor_parallel_size=1,
            vision=vision,
        )
        if model is not None and vision is not None:
            self._media = byte_store(self._options.media.cache_bytes)
            if self._options.encodes:
                self._encoder = SimEncoder(model, vision, checkpoint.model_id, cost)
        pool = BlockPool(num_blocks)
        self._memory = map_pool(layout, num_blocks)
        handoffs = Handoffs(self._memory)
        self._started = _Started(
            info=info,
            cost=cost,
            limits=limits,
            vocabulary=Vocabulary(
                checkpoint.model_id, checkpoint.word_ids, eos[0] if eos else None
            ),
            pool=pool,
            handoffs=handoffs,
            scheduler=Scheduler(pool, handoffs, limits, self._deliver_failed),
            loop=asyncio.get_running_loop(),
        )
        self._options.on_progress(1.0)
        return info

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        started, stream = self._accept(request, deliver, Purpose.GENERATE)
        self._pin(stream)
        self._add(started, stream)

    def prefill(self, request: GenerateRequest, deliver: DeliverPrefilled) -> None:
        started, stream = self._accept(request, _tell_nobody, Purpose.PREFILL)
        self._pin(stream)
        stream.deliver, stream.on_held = _as_prefilled(stream, deliver, started.loop.time)
        self._add(started, stream)

    def prefill_reserved(
        self, request_id: str, num_filled_blocks: int, deliver: DeliverPrefilled
    ) -> None:
        started = self._started
        if started is None or self._death or self._closed:
            raise EngineError(f"request {request_id}: the sim engine {self._state()}")
        self._pin_reserved(started, request_id)
        stream = started.scheduler.prefill_reserved(request_id, num_filled_blocks)
        stream.deliver, stream.on_held = _as_prefilled(stream, deliver, started.loop.time)
        self._wake(started)

    def release(self, request_id: str) -> None:
        if self._started is not None:
            self._started.scheduler.release(request_id)
            self._wake(self._started)

    def reserve(self, request: GenerateRequest, deliver: DeliverReservation) -> None:
        def ended(chunk: TokenChunk) -> None:
            deliver(Reservation(ended=chunk))

        def reserved(_first: TokenChunk | None) -> None:
            blocks = tuple(stream.blocks)
            deliver(Reservation(block_ids=blocks, num_cached_blocks=stream.num_shared))

        started, stream = self._accept(request, ended, Purpose.RESERVE)
        stream.on_held = reserved
        self._add(started, stream)

    def resume(
        self, request_id: str, first: TokenChunk | None, deliver: Deliver, opaque: bytes = b""
    ) -> None:
        started = self._started
        if started is None or self._death or self._closed:
            raise EngineError(f"request {request_id}: the sim engine {self._state()}")
        if first is None:
            self._pin_reserved(started, request_id)
        stream = started.scheduler.resume(request_id, first, deliver)
        if first is not None:
            self._firsts.append((stream, first))
            started.loop.call_soon(self._deliver_firsts, started)
        self._wake(started)

    def abort(self, request_id: str) -> None:
        if self._started is not None:
            self._started.scheduler.abort(request_id)
            self._wake(self._started)

    @property
    def kv_pool(self) -> KvPool | None:
        return self._memory

    @property
    def num_wrong_blocks(self) -> int:
        """Blocks that held something else than their prompt's KV when a request was resumed."""
        return 0 if self._started is None else self._started.handoffs.num_wrong_blocks

    @property
    def media_store(self) -> MediaStore | None:
        return self._media

    @property
    def encoder(self) -> ImageEncoder | None:
        return self._encoder

    async def holdings(self) -> Mapping[str, int]:
        return {} if self._started is None else self._started.scheduler.holdings()

    async def kv_events(self) -> AsyncIterator[KvEvent]:
        if self._started is None:
            raise EngineDead(f"the sim engine {self._state()} and has no KV events")
        async for event in self._started.pool.events.follow():
            yield event

    def stats(self) -> EngineStats:
        return EngineStats() if self._started is None else self._started.scheduler.stats()

    async def died(self) -> EngineDead:
        await self._has_died.wait()
        assert self._death is not None
        return self._death

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop(FinishReason.ABORT)
        # The last reference here; whoever still looks at the blocks keeps their pages.
        self._memory = self._media = self._encoder = None

    def _accept(
        self, request: GenerateRequest, deliver: Deliver, purpose: Purpose
    ) -> tuple[_Started, Stream]:
        """Check a request and return its stream. Raises what ``submit`` raises."""
        started = self._started
        if started is None or self._death or self._closed:
            raise EngineDead(f"the sim engine {self._state()} and takes no request")
        info, limits = started.info, started.limits
        if not self._options.generates:
            raise NotSupported(
                f"request {request.request_id}: this worker encodes images and generates nothing",
                param="model",
            )
        check_request(
            request,
            info,
            chunked_prefill=limits.chunked_prefill,
            running=started.scheduler.streams,
        )
        self._num_accepted += 1
        return started, Stream(
            request,
            deliver,
            purpose=purpose,
            arrival=self._num_accepted,
            vocabulary=started.vocabulary,
            eos_probability=started.cost.eos_probability,
            block_size=limits.block_size,
            root=root_hash(info.model_id, request.cache_salt),
            reuse=limits.reuse,
        )

    def _pin(self, stream: Stream) -> None:
        """Keep the bytes of a stream's images until it ends. Raises EngineError when they are not here."""
        store, pinned = self._media, pin_media(stream.request, self._media)
        if pinned:
            stream.on_ended = lambda: unpin_media(store, pinned)

    def _pin_reserved(self, started: _Started, request_id: str) -> None:
        stream = started.scheduler.streams.get(request_id)
        if stream is not None and stream.phase is Phase.RESERVED:
            stream.on_ended()  # what an earlier attempt, which was refused, has pinned
            stream.on_ended = nothing_held
            self._pin(stream)

    def _add(self, started: _Started, stream: Stream) -> None:
        started.scheduler.add(stream)
        self._wake(started)

    def _wake(self, started: _Started) -> None:
        """Let an engine that stands still look for work."""
        if self._timer is None and not (self._closed or self._death):
            # Not at once: requests that arrive together shall share the first step.
            self._due_s = started.loop.time()
            self._timer = started.loop.call_soon(self._tick, started)

    def _deliver_firsts(self, started: _Started) -> None:
        firsts, self._firsts = self._firsts, []
        for stream, first in firsts:
            if stream.phase is not Phase.ENDED:
                started.scheduler.deliver(stream, first)

    def _tick(self, started: _Started) -> None:
        """End the step in flight and begin the next."""
        try:
            self._turn(started)
        except Exception as error:  # noqa: BLE001  # whatever it was, no stream may hang
            self._die(EngineDead(f"the sim engine failed in a step: {error!r}"), error)

    def _turn(self, started: _Started) -> None:
        scheduler, cost, loop = started.scheduler, started.cost, started.loop
        # Before any token of the stream's own. A loop may run a timer that is due before a callback
        # that was to be called soon, so the order of the two is not to be relied on.
        self._deliver_firsts(started)
        if self._step is not None:
            step, self._step = self._step, None
            scheduler.finish(step)
            if cost.die_after_steps and scheduler.num_steps >= cost.die_after_steps:
                why = f"after {scheduler.num_steps} steps, as its cost model asks (die_after_steps)"
                self._die(EngineDead(f"the sim engine died {why}"))
                return
        self._step = scheduler.plan()
        if self._step is None:
            self._timer = None
            return
        duration = _duration_s(cost, self._step, scheduler)
        now = loop.time()
        for chunk in self._step.chunks:
            if chunk.stream.started_s is None:
                chunk.stream.started_s = now
        self._due_s = max(self._due_s + duration, now - _MAX_LATENESS_S)
        if duration:
            due = max(self._due_s, now + duration / 2)
            self._timer = loop.call_at(due, self._tick, started)
        else:
            self._timer = loop.call_soon(self._tick, started)

    def _deliver_failed(self, stream: Stream, error: Exception) -> None:
        """Report a consumer that raised and end its stream alone."""
        self.abort(stream.request_id)
        if self._started is not None:
            message = f"request {stream.request_id}: its consumer raised and it is aborted"
            self._started.loop.call_exception_handler({"message": message, "exception": error})

    def _die(self, death: EngineDead, cause: Exception | None = None) -> None:
        death.__cause__ = cause
        self._death = death
        self._stop(FinishReason.ERROR, EngineDead.code, str(death))
        self._has_died.set()

    def _stop(self, reason: FinishReason, code: str | None = None, why: str | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._started is not None:
            self._started.scheduler.end_all(reason, code, why)
            self._started.pool.events.close()

    def _state(self) -> str:
        if self._death:
            return f"died ({self._death})"
        return "is closed" if self._closed else "has not started"


def _as_prefilled(
    stream: Stream, deliver: DeliverPrefilled, clock: Callable[[], float]
) -> tuple[Deliver, OnHeld]:
    """Return what a stream calls at its end and when it is pinned, so that ``deliver`` hears of both."""
    asked_s = clock()

    def tell(chunk: TokenChunk, blocks: tuple[int, ...] = ()) -> None:
        now = clock()
        begun = now if stream.started_s is None else stream.started_s
        deliver(
            Prefilled(
                first=chunk,
                block_ids=blocks,
                num_tokens=stream.prompt_len if blocks else 0,
                queue_s=begun - asked_s,
                compute_s=now - begun,
            )
        )

    def pinned(first: TokenChunk | None) -> None:
        assert first is not None  # the prompt was computed here
        tell(first, tuple(stream.blocks))

    return tell, pinned


def _tell_nobody(_chunk: TokenChunk) -> None:
    """Drop what comes before anybody listens, which is nothing."""


def _duration_s(cost: CostModel, step: Step, scheduler: Scheduler) -> float:
    duration = cost.base_s(prefill=bool(step.chunks), decode=bool(step.num_decoding))
    for chunk in step.chunks:
        duration += cost.prefill_s(chunk.start, chunk.num_tokens)
    kv_tokens = scheduler.kv_tokens() if cost.decode_per_kv_token_ns else 0
    return duration + cost.decode_s(step.num_decoding, kv_tokens)

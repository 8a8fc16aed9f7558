"""The executor: a thread with this project's torch engine, which makes real tokens and moves real KV."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from trtllm_workers.blocks import block_hashes, root_hash
from trtllm_workers.config.keys import default_config
from trtllm_workers.config.vision_model import read_vision
from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.registry import build_engine, engine_keys
from trtllm_workers.errors import LaunchError
from trtllm_workers.transfer.base import KvLink, KvTransport
from trtllm_workers.transfer.registry import start_transport
from trtllm_workers.types import (
    EngineInfo,
    FinishReason,
    KvEvent,
    KvEventKind,
    Prefilled,
    Reservation,
    TokenChunk,
    TransportCard,
)

from ..llmapi.disaggregated_params import DisaggregatedParams
from ..sampling_params import SamplingParams
from .control import Control
from .result import RequestOutput, Response
from .text_view import text_view
from .utils import RequestError
from .wording import block_of, hash64, logprobs_of, merged, torch_request

_KEYS = (
    "max_batch_size",
    "max_num_tokens",
    "max_seq_len",
    "enable_chunked_prefill",
    "kv_cache_config.tokens_per_block",
    "kv_cache_config.max_tokens",
    "kv_cache_config.enable_block_reuse",
)
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "cancelled",
}


class _State(msgspec.Struct):
    """What ``opaque_state`` holds here: where the blocks of a prompt lie."""

    card: TransportCard
    block_ids: list[int]


@dataclass(slots=True, eq=False)
class Work:
    """One request inside the executor."""

    number: int
    prompt: list[int]
    sampling: SamplingParams
    output: RequestOutput
    params: DisaggregatedParams | None
    salt: str
    shown: list[int] = field(default_factory=list)
    error: BaseException | None = None
    tokens: list[int] = field(default_factory=list)
    buffered: list[Response] = field(default_factory=list)
    fetching: bool = False
    aborted: bool = False
    ended: bool = False

    @property
    def name(self) -> str:
        """Its name in the torch engine."""
        return str(self.number)


class Executor:
    """Runs requests until it is shut down; called from any thread."""

    def __init__(
        self,
        model: Path,
        args: dict[str, Any],
        control: Control,
        *,
        transport: str,
        on_stats: Callable[[list[dict[str, Any]]], None],
        on_events: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        # The engine below knows no images: of a model with eyes it gets the language model.
        self._view = None if read_vision(model) is None else text_view(model)
        self._model = model if self._view is None else Path(self._view.name)
        self._args = args
        self._control = control
        self._transport_name = transport
        self._on_stats = on_stats if args.get("enable_iter_perf_stats") else None
        kv = args.get("kv_cache_config") or {}
        events = kv.get("event_buffer_max_size", 0) > 0 and kv.get("enable_block_reuse", True)
        self._on_events = on_events if events else None
        self._timeout_s = 0.0
        timeout = (args.get("cache_transceiver_config") or {}).get("kv_transfer_timeout_ms")
        if timeout:
            self._timeout_s = timeout / 1000
        self._interval = args.get("stream_interval", 1)
        self._works: dict[int, Work] = {}
        self._pinned: dict[str, asyncio.TimerHandle | None] = {}
        self._links: dict[str, KvLink] = {}
        self._outbox: list[tuple[RequestOutput, Response]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._tokens_of: dict[bytes, tuple[int, ...]] = {}
        self._unresolved: list[KvEvent] = []
        self._event_id = 0
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fake-trtllm", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    # --- from other threads ----------------------------------------------------------------------

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Run something in the executor's thread."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            return  # it has ended

    def add(self, work: Work) -> None:
        """Begin a request."""
        self.call(self._add, work)

    def abort(self, number: int) -> None:
        """End a request; fire and forget."""
        self.call(self._abort, number)

    def shutdown(self) -> None:
        """End everything and the thread."""
        self.call(self._stop.set)
        self._thread.join(30)
        if self._view is not None:
            self._view.cleanup()

    @property
    def vocab_size(self) -> int:
        """The model's."""
        return self._info.vocab_size

    # --- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        flat: dict[str, Any] = {}
        for key in _KEYS:
            section, _, last = key.rpartition(".")
            value = ((self._args.get(section) or {}) if section else self._args).get(last)
            if value is not None:
                flat[key.replace(".", "__")] = value
        config = default_config("torch", engine_keys("torch"), **flat)
        extra = {"num_threads": "1"}
        self._engine = build_engine("torch", EngineOptions(self._model, config, extra=extra))
        self._transport: KvTransport | None = None
        try:
            self._info: EngineInfo = await self._engine.start()
            if self._transport_name:
                pool = self._engine.kv_pool
                assert pool is not None, "the torch engine shows its pool"
                self._transport = await start_transport(
                    self._transport_name,
                    pool,
                    peer_id=f"fake-{id(self):x}",
                    host="127.0.0.1",
                    on_notify=lambda _peer, message: self._unpin(message.decode()),
                )
        except BaseException as error:  # noqa: BLE001 - told to who waits for the start
            self._failure = RuntimeError(f"executor failed to start: {error}")
            await self._engine.close()
            self._ready.set()
            return
        self._root = root_hash(self._info.model_id)
        events = asyncio.create_task(self._follow_events())
        self._ready.set()
        await self._stop.wait()
        for task in (events, *self._tasks):
            task.cancel()
        await asyncio.gather(events, *self._tasks, return_exceptions=True)
        for link in self._links.values():
            await link.close()
        if self._transport is not None:
            await self._transport.close()
        await self._engine.close()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- requests ------------------------------------------------------------------------------------

    def _add(self, work: Work) -> None:
        if self._control.death is not None:
            self._answer(work, Response(error=self._control.death))
            return
        if self._control.wedged:
            return
        if work.error is None and self._control.fail_next:
            work.error = self._control.fail_next.pop(0)
        if work.error is not None:
            self._answer(work, Response(error=work.error))
            return
        self._works[work.number] = work
        self._learn(work)
        kind = work.params.request_type if work.params is not None else None
        try:
            if kind == "context_only":
                self._need_transport()
                self._engine.prefill(
                    torch_request(work.name, work.prompt, work.salt, work.sampling, 2),
                    lambda made: self._prefilled(work, made),
                )
            elif kind == "generation_only":
                self._need_transport()
                work.fetching = True
                self._engine.reserve(
                    torch_request(work.name, work.prompt, work.salt, work.sampling),
                    lambda held: self._start(self._fetch(work, held)),
                )
            else:
                self._engine.submit(
                    torch_request(work.name, work.prompt, work.salt, work.sampling),
                    lambda chunk: self._tell(work, chunk),
                )
        except (LaunchError, RequestError) as error:
            self._fail(work, error)

    def _need_transport(self) -> None:
        if self._transport is None:
            raise RequestError("cache_transceiver_config.backend is not set")

    def _abort(self, number: int) -> None:
        work = self._works.get(number)
        if work is None or work.aborted:
            return
        work.aborted = True
        if work.fetching:
            self._control.torn += 1  # its blocks stay with it, as they may in TensorRT-LLM
            self._finish(work, Response(finish_reason="cancelled"))
        elif work.name not in self._pinned:
            self._engine.abort(work.name)

    def _tell(self, work: Work, chunk: TokenChunk) -> None:
        if chunk.error_code is not None:
            self._fail(work, RequestError(chunk.error_message or chunk.error_code))
            return
        tokens = list(chunk.token_ids)
        work.tokens += tokens
        self._learn(work)
        response = Response(
            tokens, cached_tokens=chunk.cached_tokens, logprobs=logprobs_of(chunk.logprobs)
        )
        if chunk.finish_reason is not None:
            response.finish_reason = _REASONS[chunk.finish_reason]
            if chunk.stop_token_id is not None:
                if chunk.stop_token_id == work.sampling.end_id:
                    response.token_ids.append(chunk.stop_token_id)  # an end id is listed
                else:
                    response.stop_reason = chunk.stop_token_id  # a stop word is taken off
        work.buffered.append(response)
        if response.is_final or len(work.buffered) >= self._interval:
            whole = merged(work.buffered)
            work.buffered = []
            if whole.is_final:
                self._finish(work, whole)
            else:
                self._answer(work, whole)

    def _prefilled(self, work: Work, made: Prefilled) -> None:
        first = made.first
        if first.finish_reason is not None:
            self._tell(work, first)
            return
        work.tokens += first.token_ids
        self._learn(work)
        assert self._transport is not None, "asked for before"
        self._pinned[work.name] = None
        if self._timeout_s:
            self._pinned[work.name] = self._loop.call_later(self._timeout_s, self._unpin, work.name)
        params = DisaggregatedParams(
            request_type="context_only",
            first_gen_tokens=list(first.token_ids),
            ctx_request_id=work.number,
            opaque_state=msgspec.msgpack.encode(
                _State(self._transport.card(), list(made.block_ids))
            ),
        )
        self._finish(
            work,
            Response(
                list(first.token_ids),
                "not_finished",
                cached_tokens=first.cached_tokens,
                logprobs=logprobs_of(first.logprobs),
                disaggregated_params=params,
            ),
        )

    def _unpin(self, name: str) -> None:
        timer = self._pinned.pop(name, None)
        if timer is not None:
            timer.cancel()
        self._engine.release(name)

    async def _fetch(self, work: Work, held: Reservation) -> None:
        assert work.params is not None
        assert self._transport is not None
        params = work.params
        if held.ended is not None:
            self._tell(work, held.ended)
            return
        try:
            state = msgspec.msgpack.decode(params.opaque_state or b"", type=_State)
            link = await self._link(state.card)
            skip = held.num_cached_blocks
            remote, local = state.block_ids[skip:], held.block_ids[skip:]
            if len(state.block_ids) != len(held.block_ids):
                raise RequestError("the state is of another prompt")
            await link.read(remote, local, self._timeout_s or 600.0)
            await link.notify(str(params.ctx_request_id).encode(), 10.0)
        except (LaunchError, msgspec.DecodeError, RequestError) as error:
            self._engine.abort(work.name)
            self._fail(work, RequestError(f"KV transfer failed: {error}"))
            return
        work.fetching = False
        if work.aborted:
            return  # torn: nobody takes its blocks back
        first = TokenChunk(tuple(params.first_gen_tokens or ()))
        self._engine.resume(work.name, first, lambda chunk: self._tell(work, chunk))

    async def _link(self, card: TransportCard) -> KvLink:
        assert self._transport is not None
        link = self._links.get(card.peer_id)
        if link is None:
            link = self._links[card.peer_id] = await self._transport.connect(card, 10.0)
        return link

    def _fail(self, work: Work, error: BaseException) -> None:
        self._finish(work, Response(error=RequestError(str(error))))

    def _finish(self, work: Work, response: Response) -> None:
        if work.ended:
            return
        work.ended = True
        self._works.pop(work.number, None)
        self._announce_partial(work)
        self._answer(work, response)

    def _answer(self, work: Work, response: Response) -> None:
        """Answer at the end of this turn: all of one step at once."""
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append((work.output, response))

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestOutput, Response]]] = {}
        for output, response in outbox:
            if output.loop is None:
                output.put(response)
            else:
                by_loop.setdefault(output.loop, []).append((output, response))
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:
                continue
        if self._control.death is not None:
            death = self._control.death
            works, self._works = self._works, {}
            for work in works.values():
                self._answer(work, Response(error=death))
        if self._on_stats is not None:
            self._on_stats([self._stats()])

    def kill(self) -> None:
        """Let every open request raise what ``control.death`` holds."""
        self._flush()

    # --- statistics and events -------------------------------------------------------------------------

    def _stats(self) -> dict[str, Any]:
        stats = self._engine.stats()
        return {
            "iter": stats.num_steps,
            "iterLatencyMS": 1.0,
            "numActiveRequests": stats.num_running,
            "numQueuedRequests": stats.num_waiting,
            "maxNumActiveRequests": self._info.max_batch_size,
            "kvCacheStats": {
                "maxNumBlocks": stats.total_blocks,
                "usedNumBlocks": stats.active_blocks,
                "freeNumBlocks": stats.total_blocks - stats.active_blocks,
                "tokensPerBlock": self._info.block_size,
            },
            "inflightBatchingStats": {"numScheduledRequests": stats.num_running},
        }

    def _learn(self, work: Work) -> None:
        """Remember which tokens each block hash stands for."""
        if self._on_events is None:
            return
        size = self._info.block_size
        root = root_hash(self._info.model_id, work.salt)
        tokens = [*work.prompt, *work.tokens]
        told = [*(work.shown or work.prompt), *work.tokens]
        for index, digest in enumerate(block_hashes(tokens, size, root)):
            self._tokens_of[digest] = tuple(told[index * size : (index + 1) * size])
        self._resolve()

    async def _follow_events(self) -> None:
        if self._on_events is None:
            return
        self._emit({"type": "created", "num_blocks_per_cache_level": [self._info.num_blocks, 0]})
        async for event in self._engine.kv_events():
            if event.kind is not KvEventKind.CLEARED:
                self._unresolved.append(event)
                self._resolve()

    def _resolve(self) -> None:
        """Tell the events whose tokens are known, in order."""
        while self._unresolved:
            event = self._unresolved[0]
            if event.kind is KvEventKind.STORED:
                if any(one not in self._tokens_of for one in event.block_hashes):
                    return
                parent = event.parent_hash
                blocks = [block_of(hash64(one), self._tokens_of[one]) for one in event.block_hashes]
                self._emit(
                    {
                        "type": "stored",
                        "parent_hash": None if parent is None else hash64(parent),
                        "blocks": blocks,
                    }
                )
            else:
                hashes = [hash64(one) for one in event.block_hashes]
                self._emit({"type": "removed", "block_hashes": hashes})
            self._unresolved.pop(0)

    def _announce_partial(self, work: Work) -> None:
        """Tell of the last block that is not full, and take it back: both happen."""
        if self._on_events is None:
            return
        tokens = [*(work.shown or work.prompt), *work.tokens]
        rest = len(tokens) % self._info.block_size
        full = len(tokens) - rest
        if not rest or full:  # with a parent it would have to wait for that one's event
            return
        name = hash((work.number, "partial")) % (1 << 64)
        self._emit(
            {
                "type": "stored",
                "parent_hash": None,
                "blocks": [block_of(name, tuple(tokens[full:]))],
            }
        )
        self._emit({"type": "removed", "block_hashes": [name]})

    def _emit(self, data: dict[str, Any]) -> None:
        assert self._on_events is not None, "asked for before"
        event = {"event_id": self._event_id, "data": data, "window_size": self._info.max_seq_len}
        self._event_id += 1
        if self._control.drop_events:
            self._control.drop_events -= 1
            return
        self._on_events([event])


def _put_all(items: list[tuple[RequestOutput, Response]]) -> None:
    for output, response in items:
        output.put(response)

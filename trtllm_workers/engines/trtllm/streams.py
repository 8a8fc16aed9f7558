"""Requests inside TensorRT-LLM: begun, followed, handed over, aborted. Starts and ends no engine.

Each request that runs has one task that reads its result. What that tells is turned into chunks; what it
raises is the request's fault or the engine's (``failures.py``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import msgspec
import structlog

from trtllm_workers.engines.acceptance import check_request
from trtllm_workers.engines.base import Deliver, DeliverPrefilled, DeliverReservation
from trtllm_workers.engines.trtllm.api import Api
from trtllm_workers.engines.trtllm.chunks import ChunkMaker
from trtllm_workers.engines.trtllm.entries import Entry, Phase
from trtllm_workers.engines.trtllm.failures import SUSPICIOUS_FAILURES, in_words, is_fatal
from trtllm_workers.engines.trtllm.handoff_state import decode_state
from trtllm_workers.engines.trtllm.images import check_kinds, salt_of
from trtllm_workers.engines.trtllm.media_prompts import (
    MediaPrompts,
    needs_media,
    require_seen,
    wrong_length,
)
from trtllm_workers.engines.trtllm.prefill_result import read_prefill
from trtllm_workers.engines.trtllm.sampling import stop_ids, trtllm_sampling
from trtllm_workers.errors import (
    EngineDead,
    EngineError,
    LaunchError,
    NotSupported,
    RequestError,
    TransferFailed,
)
from trtllm_workers.types import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Prefilled,
    Reservation,
    TokenChunk,
)

log = structlog.get_logger(__name__)

# TensorRT-LLM gives a transfer up at its own deadline; this much later it has had the time to say so.
_TRANSFER_GRACE_S = 2.0


class Accounts(Protocol):
    """Who is told of every request: for statistics, for what is cached, for what holds blocks."""

    def opened(self, request: GenerateRequest) -> None:
        """A request begins to hold blocks."""

    def ended(self, request_id: str, cached_tokens: int, num_output: int, aborted: bool) -> None:
        """It holds none any more."""

    def cached_blocks(self, request: GenerateRequest) -> int:
        """Return how many leading blocks of its prompt are believed to be cached."""


class Streams:
    """All requests of one engine; see ``engines/base.py: Engine`` for what each call guarantees.

    ``on_broken`` is told, once, why the engine cannot go on. ``loras`` are requests' adapters by name.
    ``prompts`` makes inputs of requests with images; None: there are none.
    ``transfer_timeout_s`` is after how long TensorRT-LLM gives up KV that nobody fetches, 0: never.
    """

    def __init__(
        self,
        api: Api,
        llm: Any,
        info: EngineInfo,
        accounts: Accounts,
        *,
        loras: dict[str, Any],
        chunked_prefill: bool,
        transfer_timeout_s: float,
        prompts: MediaPrompts | None = None,
        on_broken: Callable[[EngineDead], None],
        on_doubt: Callable[[], None],
    ) -> None:
        self._api = api
        self._llm = llm
        self.info = info
        self._accounts = accounts
        self._loras = loras
        self._chunked_prefill = chunked_prefill
        self._transfer_timeout_s = transfer_timeout_s
        self._prompts = prompts
        self._on_broken = on_broken
        self._on_doubt = on_doubt
        self._entries: dict[str, Entry] = {}
        self._leaving: set[Entry] = set()  # nobody listens, but TensorRT-LLM still works on them
        self._loop = asyncio.get_running_loop()
        self._num_failures = 0
        self._death: EngineDead | None = None

    @property
    def request_ids(self) -> list[str]:
        """Requests that somebody still waits for or holds."""
        return list(self._entries)

    # --- the calls of the contract --------------------------------------------------------------

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Begin a request that stays here."""
        self._accept(request)
        entry = Entry(request, Phase.GENERATING, deliver)
        self._generate(entry)
        self._enter(entry)

    def prefill(self, request: GenerateRequest, deliver: DeliverPrefilled) -> None:
        """Compute a prompt for another worker."""
        self._accept(request)
        entry = Entry(request, Phase.PREFILLING, deliver, began_s=time.monotonic())
        sampling = trtllm_sampling(self._api, request.sampling, self.info)
        # An answer of one token ends here, and no KV of it shall wait for anybody.
        alone = request.sampling.max_tokens == 1
        params = None if alone else self._api.disaggregated_params(request_type="context_only")
        self._call(entry, sampling, streaming=False, disaggregated_params=params)
        self._enter(entry)
        entry.task = self._loop.create_task(self._watch(entry, self._read_prefill(entry)))

    def release(self, request_id: str) -> None:
        """Forget a prompt that was fetched or given up: TensorRT-LLM frees its KV by itself."""
        entry = self._entries.get(request_id)
        if entry is not None and entry.phase is Phase.PREFILLED:
            self._leave(entry)

    def reserve(self, request: GenerateRequest, deliver: DeliverReservation) -> None:
        """Take a request in; TensorRT-LLM finds the blocks itself when it begins."""
        self._accept(request)
        entry = Entry(request, Phase.RESERVED, None)
        self._enter(entry)
        cached = self._accounts.cached_blocks(request)
        self._loop.call_soon(
            self._tell_reserved, entry, deliver, Reservation(num_cached_blocks=cached)
        )

    def resume(
        self, request_id: str, first: TokenChunk | None, deliver: Deliver, opaque: bytes = b""
    ) -> None:
        """Go on with a reserved request: from a handoff's state, or from its prompt."""
        self._require_alive(request_id)
        entry = self._entries.get(request_id)
        if entry is None or entry.phase is not Phase.RESERVED:
            raise EngineError(
                f"request {request_id}: holds no reservation here (any more); reserve it again"
            )
        if first is not None and first.finish_reason is not None:
            self._leave(entry)
            self._loop.call_soon(deliver, first)
            return
        entry.deliver = deliver
        if first is None:
            self._generate(entry)
            entry.phase = Phase.GENERATING
        else:
            self._fetch(entry, first, decode_state(self._api, opaque, first.token_ids))

    def abort(self, request_id: str) -> None:
        """End a request; one whose KV is on its way goes on unheard until the KV has come.

        A transfer that is torn down leaks blocks in TensorRT-LLM, and may hang it.
        """
        entry = self._entries.get(request_id)
        if entry is None or entry.aborted:
            return
        if entry.phase in (Phase.PREFILLED, Phase.RESERVED):
            self._leave(entry, aborted=True)
            return
        entry.aborted = True
        if entry.phase is Phase.FETCHING:
            deliver = entry.deliver
            self._go_on_unheard(entry)
            self._leave(entry, aborted=True)
            if deliver is not None:
                self._loop.call_soon(deliver, TokenChunk((), FinishReason.ABORT))
        else:
            entry.result.abort()

    # --- inside ---------------------------------------------------------------------------------

    def _accept(self, request: GenerateRequest) -> None:
        self._require_alive(request.request_id)
        check_request(
            request, self.info, chunked_prefill=self._chunked_prefill, running=self._entries
        )
        check_kinds(request, self.info.vision)
        if request.media and self._prompts is not None:
            self._prompts.check(request)

    def _require_alive(self, request_id: str) -> None:
        if self._death is not None:
            raise EngineDead(f"request {request_id}: {self._death}")

    def _enter(self, entry: Entry) -> None:
        self._entries[entry.request_id] = entry
        self._accounts.opened(entry.request)

    def _leave(
        self, entry: Entry, cached_tokens: int = 0, num_output: int = 0, *, aborted: bool = False
    ) -> None:
        if self._entries.get(entry.request_id) is entry:
            del self._entries[entry.request_id]
            self._accounts.ended(entry.request_id, cached_tokens, num_output, aborted)
            self._unpin(entry)
        if entry.timer is not None:
            entry.timer.cancel()

    def _generate(self, entry: Entry) -> None:
        sampling = trtllm_sampling(self._api, entry.request.sampling, self.info)
        self._call(entry, sampling, streaming=True)
        if entry.request.media and (wrong := wrong_length(entry.request, entry.result)):
            log.warning("usage and limits are not exact", reason=wrong)
        entry.task = self._loop.create_task(
            self._watch(entry, self._read(entry, self._maker(entry)))
        )

    def _fetch(self, entry: Entry, first: TokenChunk, params: Any) -> None:
        entry.phase = Phase.FETCHING
        entry.brought = True
        sampling = trtllm_sampling(self._api, entry.request.sampling, self.info)
        try:
            self._call(entry, sampling, streaming=True, disaggregated_params=params)
        except BaseException:
            entry.phase = Phase.RESERVED
            raise
        maker = self._maker(entry, first)
        entry.task = self._loop.create_task(self._watch(entry, self._read(entry, maker)))
        if self._transfer_timeout_s:
            wait_s = self._transfer_timeout_s + _TRANSFER_GRACE_S
            text = f"TensorRT-LLM did not fetch the KV within {wait_s:g} s"
            entry.timer = self._loop.call_later(wait_s, self._fetch_failed, entry, text)

    def _call(self, entry: Entry, sampling: Any, **more: Any) -> None:
        """Give a request to TensorRT-LLM. Raises what the caller of the contract expects."""
        request = entry.request
        if request.lora:
            more["lora_request"] = self._loras[request.lora]
        if salt := salt_of(request):
            more["cache_salt"] = salt
        params = more.get("disaggregated_params")
        kind = None if params is None else params.request_type
        inputs: Any = request.prompt_token_ids
        if self._prompts is not None and needs_media(request, kind):
            inputs = self._prompts.hold(entry)
        try:
            require_seen(request, inputs, kind)
            entry.result = self._llm.generate_async(inputs, sampling, **more)
        except Exception as error:
            self._unpin(entry)
            raise self._refused(error, shows=inputs is not request.prompt_token_ids) from error

    def _refused(self, error: Exception, *, shows: bool) -> LaunchError:
        """Return what an error of ``generate_async`` means for the caller; the engine may have ended with it."""
        if isinstance(error, LaunchError):
            return error
        if isinstance(error, ValueError | self._api.request_error):
            return RequestError(f"TensorRT-LLM refuses the request: {in_words(error)}")
        if isinstance(error, NotImplementedError):  # its input processor attaches no embeddings
            text = f"TensorRT-LLM cannot take this model's images like this: {in_words(error)}"
            return NotSupported(text, param="media")
        if shows and not is_fatal(error):
            # A model's input processor runs here, and fails in ways of its own on what it cannot take.
            self._num_failures += 1
            if self._num_failures % SUSPICIOUS_FAILURES == 0:
                self._on_doubt()
            return RequestError(
                f"TensorRT-LLM cannot take these images: {in_words(error)}", param="media"
            )
        # Anything else means that it cannot go on.
        dead = EngineDead(f"TensorRT-LLM takes no requests any more: {in_words(error)}")
        self._on_broken(dead)
        return dead

    def _unpin(self, entry: Entry) -> None:
        if self._prompts is not None:
            self._prompts.let_go(entry)

    def _maker(self, entry: Entry, first: TokenChunk | None = None) -> ChunkMaker:
        sampling = entry.request.sampling
        stops = stop_ids(sampling, self.info)
        return ChunkMaker(sampling.max_tokens, stops, sampling.logprobs, first)

    # --- reading --------------------------------------------------------------------------------

    async def _watch(self, entry: Entry, reading: Any) -> None:
        """Read a result to its end and judge what it raises."""
        try:
            await reading
        except self._api.request_error as error:
            if is_fatal(error):
                self._on_broken(EngineDead(f"TensorRT-LLM is broken: {in_words(error)}"))
            else:
                self._failed(entry, error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._on_broken(EngineDead("TensorRT-LLM cancelled its own result"))
        except LaunchError as error:
            self._fail(entry, error)
        except Exception as error:  # noqa: BLE001 - out of its iteration: it has shut itself down
            self._on_broken(EngineDead(f"TensorRT-LLM failed: {in_words(error)}"))
        finally:
            self._leaving.discard(entry)

    async def _read(self, entry: Entry, maker: ChunkMaker) -> None:
        """Pass the chunks of a stream on until it ends."""
        entries, request_id = self._entries, entry.request_id
        num_output = 0
        async for result in entry.result:
            if entry.deliver is None:
                if entry.phase is Phase.FETCHING:
                    entry.phase = Phase.GENERATING
                    entry.result.abort()  # the KV is here, so nothing is torn
                continue
            chunk = maker.take(result.outputs[0], result.cached_tokens or 0)
            if chunk is None:
                continue
            if entry.phase is Phase.FETCHING:
                if chunk.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                    self._fetch_failed(
                        entry, "TensorRT-LLM ended the request before its KV had come"
                    )
                    return
                entry.phase = Phase.GENERATING
                if entry.timer is not None:
                    entry.timer.cancel()
            num_output += len(chunk.token_ids) + chunk.num_hidden_tokens
            if chunk.finish_reason is None:
                if not entry.aborted:
                    self._tell(entry, chunk)
                continue
            if entries.get(request_id) is entry:
                self._end(entry, chunk, num_output)
            if not result.finished:
                entry.result.abort()  # more was on its way than was asked for
            return
        if entry.deliver is not None and entries.get(request_id) is entry:
            raise EngineError(
                f"request {request_id}: TensorRT-LLM ended it without a finish reason"
            )

    def _end(self, entry: Entry, chunk: TokenChunk, num_output: int) -> None:
        cached_tokens = 0 if entry.brought else chunk.cached_tokens
        self._leave(entry, cached_tokens, num_output, aborted=entry.aborted)
        self._tell(entry, self._last(entry, chunk))

    def _last(self, entry: Entry, chunk: TokenChunk) -> TokenChunk:
        """Return the last chunk to tell; how the caller ended it counts for more than TensorRT-LLM's word."""
        if entry.aborted:
            return TokenChunk((), FinishReason.ABORT, chunk.cached_tokens)
        if chunk.finish_reason is FinishReason.ABORT:
            return _error(EngineError(f"request {entry.request_id}: TensorRT-LLM cancelled it"))
        self._num_failures = 0
        return chunk

    async def _read_prefill(self, entry: Entry) -> None:
        result = await entry.result
        if entry.request.media and (wrong := wrong_length(entry.request, result)):
            raise EngineError(f"{wrong}, so decode cannot go on from it")
        made = read_prefill(
            result, entry.request, self.info, self._api.version, self._transfer_timeout_s
        )
        first = made.first
        if entry.aborted or first.finish_reason is not None:
            if self._entries.get(entry.request_id) is entry:
                num_output = len(first.token_ids)
                self._leave(entry, first.cached_tokens, num_output, aborted=entry.aborted)
                self._tell(entry, Prefilled(first=self._last(entry, first)))
            return
        entry.phase = Phase.PREFILLED
        self._num_failures = 0
        seconds = time.monotonic() - entry.began_s
        self._tell(entry, msgspec.structs.replace(made, compute_s=seconds))

    def _tell(self, entry: Entry, what: TokenChunk | Prefilled) -> None:
        """Deliver; a consumer that raises loses its own request and no other."""
        if entry.deliver is None:
            return
        try:
            entry.deliver(what)
        except Exception as error:  # noqa: BLE001 - the consumer's fault, not TensorRT-LLM's
            self._loop.call_exception_handler(
                {"message": f"request {entry.request_id}: its consumer raised", "exception": error}
            )
            self.abort(entry.request_id)

    # --- failures -------------------------------------------------------------------------------

    def _failed(self, entry: Entry, error: Exception) -> None:
        """Take a RequestError of TensorRT-LLM."""
        self._num_failures += 1
        if entry.phase is Phase.FETCHING:
            self._fetch_failed(entry, in_words(error))
        else:
            self._fail(entry, EngineError(f"TensorRT-LLM: {in_words(error)}"))
        if self._num_failures % SUSPICIOUS_FAILURES == 0:
            self._on_doubt()

    def _fetch_failed(self, entry: Entry, why: str) -> None:
        """Say that the KV did not come: the request is reserved again, and its prompt may be computed here."""
        if self._entries.get(entry.request_id) is not entry or entry.phase is not Phase.FETCHING:
            return
        deliver = entry.deliver
        self._go_on_unheard(entry)
        if entry.timer is not None:
            entry.timer.cancel()
        self._entries[entry.request_id] = Entry(entry.request, Phase.RESERVED, None)
        log.warning("KV was not fetched", request_id=entry.request_id, reason=why)
        failed = Entry(entry.request, Phase.RESERVED, deliver)
        self._tell(failed, _error(TransferFailed(f"request {entry.request_id}: {why}")))

    def _go_on_unheard(self, entry: Entry) -> None:
        """Let TensorRT-LLM finish the transfer; then the request is aborted."""
        entry.deliver = None
        if entry.task is not None and not entry.task.done():
            self._leaving.add(entry)

    def _fail(self, entry: Entry, error: LaunchError) -> None:
        if self._entries.get(entry.request_id) is not entry:
            return
        self._leave(entry, aborted=entry.aborted)
        chunk = TokenChunk((), FinishReason.ABORT) if entry.aborted else _error(error)
        self._tell(entry, Prefilled(first=chunk) if entry.phase is Phase.PREFILLING else chunk)

    # --- the end --------------------------------------------------------------------------------

    def bury(self, death: EngineDead) -> None:
        """End every request: the engine is dead."""
        self._death = death
        self._end_all(partial(_error, death))

    def close(self) -> None:
        """End every request with an abort; nothing is begun any more."""
        self._death = self._death or EngineDead("the engine is closed")
        self._end_all(lambda: TokenChunk((), FinishReason.ABORT))

    async def stop_reading(self) -> None:
        """End the tasks; call after TensorRT-LLM has been shut down."""
        tasks = [entry.task for entry in self._leaving if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end_all(self, last: Callable[[], TokenChunk]) -> None:
        me = asyncio.current_task()
        for entry in list(self._entries.values()):
            self._leave(entry)
            if entry.task is not None and entry.task is not me and not entry.task.done():
                entry.task.cancel()
            if entry.phase is Phase.PREFILLING:
                self._tell(entry, Prefilled(first=last()))
            elif entry.phase is not Phase.PREFILLED:
                self._tell(entry, last())
            entry.deliver = None

    def _tell_reserved(
        self, entry: Entry, deliver: DeliverReservation, reservation: Reservation
    ) -> None:
        if self._entries.get(entry.request_id) is entry:
            deliver(reservation)
        else:
            deliver(Reservation(ended=TokenChunk((), FinishReason.ABORT)))


def _error(error: LaunchError) -> TokenChunk:
    return TokenChunk(
        (),
        FinishReason.ERROR,
        error_code=error.code or "engine_error",
        error_message=str(error),
        error_param=error.param,
    )

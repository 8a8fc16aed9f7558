"""The engine contract: tokens in, tokens out. Knows no text, no HTTP and no other process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import EngineDead
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import (
    EngineInfo,
    EngineStats,
    GenerateRequest,
    KvEvent,
    MediaKind,
    Prefilled,
    Reservation,
    TokenChunk,
)

Deliver = Callable[[TokenChunk], None]
DeliverPrefilled = Callable[[Prefilled], None]
DeliverReservation = Callable[[Reservation], None]

# ``EngineInfo.kv_transport`` of an engine that moves its own KV.
ENGINE_NATIVE = "engine-native"


def _ignore_progress(_done: float) -> None:
    """Drop progress reports."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What every engine is built from.

    ``on_progress`` is told the loaded share of the model, 0 to 1, from any thread.
    ``extra`` holds engine-specific options that are not TensorRT-LLM keys (sim: ``cost_path``).
    ``encodes``: load the vision tower, where the model has one. ``generates``: load the language model;
    without it every request is refused, and the engine is there for its ``encoder`` (role encode).
    """

    model_path: Path
    config: EngineConfig
    on_progress: Callable[[float], None] = _ignore_progress
    extra: Mapping[str, str] = field(default_factory=dict)
    media: MediaSettings = field(default_factory=MediaSettings)
    encodes: bool = True
    generates: bool = True


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What an image of some size becomes: placeholder tokens, grid (see MediaItem) and bytes.

    ``kind`` EMBEDDINGS: ``num_bytes`` of rows [num_tokens, hidden]. IMAGE: the engine takes images as they
    are, and keeps ``num_bytes`` of RGB.
    """

    num_tokens: int
    num_bytes: int
    grid: tuple[int, int, int] | None = None
    kind: MediaKind = MediaKind.EMBEDDINGS


class ImageEncoder(Protocol):
    """An engine's vision tower. Calls may come from any thread, one at a time for ``encode``.

    * ``plan`` tells what an image of (height, width) becomes. It raises MediaRejected for sizes that the
      model cannot take.
    * ``encode`` fills ``into`` (as many bytes as planned, in pieces) from ``pixels``, RGB bytes
      [height, width, 3]. Equal pixels give equal bytes, whatever else runs, on every worker of one model
      and host kind. It blocks.
    * ``check_grid`` raises MediaRejected unless embeddings of so many tokens can have this grid (None:
      none was given). It returns the grid to use.
    * ``fingerprint`` covers the weights and settings that embeddings depend on.
    """

    @property
    def fingerprint(self) -> bytes: ...
    def plan(self, height: int, width: int) -> ImagePlan: ...
    def check_grid(
        self, num_tokens: int, grid: tuple[int, int, int] | None
    ) -> tuple[int, int, int] | None: ...
    def encode(
        self, pixels: memoryview, height: int, width: int, into: Sequence[memoryview]
    ) -> None: ...


class Engine(Protocol):
    """Guarantees every engine gives; tests/contract/test_engine.py checks each line.

    * ``start`` loads the model and returns once ``submit`` may be called; it raises ConfigError for
      what the operator can mend (missing folder, broken file, pool too small), naming the file or key.
    * ``submit`` does not block; ``deliver`` is called on the event loop that ran ``start``, and all
      chunks of one engine step are delivered in one iteration of that loop.
    * ``submit`` raises RequestError (naming the field in ``param``) for what this engine cannot
      honour, ContextTooLong when prompt + max_tokens exceed ``max_seq_len`` or the whole pool, and
      then never calls ``deliver``. It raises EngineDead after the engine died or was closed.
    * Every accepted request ends: the last chunk of a stream, and only it, has a finish_reason.
      Nothing is delivered after it.
    * Requests are concurrent; one that fails does not touch the others.
    * Greedy tokens depend on prompt and model alone: not on batch mates, chunking of the prompt,
      prefix reuse, or preemption. With a seed, the same holds for sampled tokens.
    * ``abort`` ends a stream with FinishReason.ABORT within one engine step, and its blocks are free
      then; of an unknown or finished request it does nothing.
    * When the pool is full, running requests are preempted and finish later; no request is lost.
    * A prompt whose leading blocks are cached reports ``cached_tokens``; at least the last prompt
      token is always computed. Eviction takes least recently used cached blocks, never active ones.
    * ``kv_events`` begins with a snapshot (CLEARED, then STORED) and continues without a gap;
      sequence numbers grow by one. Several subscriptions may run.
    * When all requests have ended, ``stats`` shows no active block.
    * ``died`` returns the error when the engine cannot go on; open streams have then ended with
      FinishReason.ERROR and code ``engine_dead``.
    Handoffs, prefill side:

    * ``prefill`` checks like ``submit``; it computes the prompt and samples one token, then calls
      ``deliver`` exactly once. Unless the request ended with that token (stop, length 1, abort,
      error), the prompt's blocks stay pinned: neither evicted nor overwritten until ``release``.
    * ``release`` unpins; full blocks stay as prefix cache. Of an unknown request it does nothing.
    * ``prefill_reserved`` of a request that was reserved here goes on as ``prefill``, with the same
      ``Prefilled``: the first ``num_filled_blocks`` blocks hold the KV of their tokens, brought by the
      caller or cached; the rest of the prompt is computed. At least its last token is: EngineError for
      more blocks than that allows, for a request that is not reserved (any more), and from an engine
      that moves its own KV.

    Handoffs, decode side:

    * ``reserve`` checks like ``submit``; it waits its turn for blocks of the whole prompt, holds them
      and calls ``deliver`` exactly once. The caller may then write KV into the blocks that are not
      cached; the engine does not touch them.
    * ``resume`` of a reserved request goes on as if its prompt had been computed here: ``deliver`` gets
      ``first``, then all later chunks, as after ``submit``. With ``first`` None the caller brought
      nothing: the engine computes everything after the cached blocks itself. It raises EngineError
      when the request is not reserved (any more).
    * The stream after ``prefill`` elsewhere and ``resume`` here has the tokens that ``submit`` gives.
    * An engine that moves its own KV (``kv_pool`` None, ``EngineInfo.kv_transport`` "engine-native") is
      given ``opaque``, what ``Prefilled`` held. It then fetches the KV before it delivers anything. When
      that fails, ``deliver`` gets FinishReason.ERROR with code ``transfer_failed`` as the only chunk, and
      the request is still reserved: ``resume`` with ``first`` None may follow.

    Both sides:

    * ``abort`` works in every phase: before ``deliver`` of ``prefill`` or ``reserve`` it ends them with
      FinishReason.ABORT; a pinned or reserved request loses its blocks without another call. So the
      caller aborts only when nobody reads or writes them any more.
    * ``kv_pool`` is the memory of all blocks, once started; None: the engine moves its own KV.
    * ``holdings`` returns the number of blocks that each request holds, by request id.

    Images:

    * A request with ``media`` is taken by ``submit``, ``prefill``, ``prefill_reserved`` and ``resume`` with
      ``first`` None when the bytes of all its items are in ``media_store``; EngineError otherwise. The engine
      pins them until the request ends. ``reserve``, and ``resume`` after a prefill elsewhere, need none.
    * Tokens depend on what the images show, wherever the embeddings were made; requests whose images
      differ never share cached blocks from the first image on.
    * A placeholder token outside of ``media``, and an engine without ``EngineInfo.vision`` that gets
      ``media``: RequestError.
    * ``media_store`` is there once started; None: text only. ``encoder`` makes items of images; None: there
      is no vision tower here.

    The end:

    * ``close`` ends open streams with FinishReason.ABORT, is safe after a failed ``start``, and
      safe twice; afterwards no thread or memory of the engine is left.
    """

    async def start(self) -> EngineInfo: ...

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def prefill(self, request: GenerateRequest, deliver: DeliverPrefilled) -> None: ...

    def prefill_reserved(
        self, request_id: str, num_filled_blocks: int, deliver: DeliverPrefilled
    ) -> None: ...

    def release(self, request_id: str) -> None: ...

    def reserve(self, request: GenerateRequest, deliver: DeliverReservation) -> None: ...

    def resume(
        self, request_id: str, first: TokenChunk | None, deliver: Deliver, opaque: bytes = b""
    ) -> None: ...

    @property
    def kv_pool(self) -> KvPool | None: ...

    @property
    def media_store(self) -> MediaStore | None: ...

    @property
    def encoder(self) -> ImageEncoder | None: ...

    async def holdings(self) -> Mapping[str, int]: ...

    def kv_events(self) -> AsyncIterator[KvEvent]: ...

    def stats(self) -> EngineStats: ...

    async def died(self) -> EngineDead: ...

    async def close(self) -> None: ...


async def generate(engine: Engine, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
    """Yield the chunks of one request; leaving the loop early aborts it."""
    chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()
    engine.submit(request, chunks.put_nowait)
    finished = False
    try:
        while not finished:
            chunk = await chunks.get()
            finished = chunk.finish_reason is not None
            yield chunk
    finally:
        if not finished:
            engine.abort(request.request_id)

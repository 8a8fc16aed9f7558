"""What the adapter knows of its engine beside the streams: load, cached blocks, who holds how many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import msgspec

from trtllm_workers.blocks import namespace
from trtllm_workers.engines.event_log import KvEventLog
from trtllm_workers.engines.trtllm.images import salt_of
from trtllm_workers.engines.trtllm.kv_index import KvIndex
from trtllm_workers.engines.trtllm.polling import Rearm, poll
from trtllm_workers.types import EngineInfo, EngineStats, GenerateRequest, KvEvent

# Statistics of the warm-up request tell how many blocks there are; they come right after it.
_FIRST_STATS_S = 5.0
_CANCEL_AGAIN_S = 0.1


class Books:
    """Follows one LLM's statistics and events, and keeps account of its requests.

    Blocks that a request holds are counted as TensorRT-LLM allots them: for the prompt and all that may
    be generated. ``stats`` obeys what ``EngineStats`` promises, also while TensorRT-LLM's own figures are old.
    """

    def __init__(self, llm: Any, info: EngineInfo) -> None:
        self._llm = llm
        self._info = info
        placeholder = None if info.vision is None else info.vision.image_token_id
        self._index = KvIndex(info.model_id, info.block_size, info.vocab_size, placeholder)
        self._events = KvEventLog()
        self._rearm = Rearm()
        self._tasks: list[asyncio.Task[None]] = []
        self._newest: Mapping[str, Any] = {}
        self._first = asyncio.Event()
        self._held: dict[str, int] = {}
        self._totals = EngineStats()

    async def start(self, info: EngineInfo) -> EngineInfo:
        """Begin to follow, after the first request; return ``info`` with the blocks there really are.

        That first request was our own, and does not count.
        """
        self._totals = EngineStats()
        for what, call, take in (
            ("statistics", self._llm.get_stats_async, self._take_stats),
            ("KV events", self._llm.get_kv_cache_events_async, self._take_event),
        ):
            polling = poll(what, call, take, self._rearm, lambda: bool(self._held))
            self._tasks.append(asyncio.create_task(polling, name=f"trtllm {what}"))
        try:
            async with asyncio.timeout(_FIRST_STATS_S):
                await self._first.wait()
        except TimeoutError:
            return info  # enable_iter_perf_stats was switched off; the config's bound stays
        num_blocks = self._kv("maxNumBlocks")
        if num_blocks:
            info = msgspec.structs.replace(info, num_blocks=num_blocks)
        self._info = info
        return info

    # --- news of TensorRT-LLM -------------------------------------------------------------------

    def _take_stats(self, stats: Mapping[str, Any]) -> None:
        self._newest = stats
        self._first.set()

    def _take_event(self, event: Mapping[str, Any]) -> None:
        self._events.apply(self._index.take(event))

    def _kv(self, name: str) -> int:
        return int((self._newest.get("kvCacheStats") or {}).get(name) or 0)

    # --- accounts of requests (``streams.Accounts``) ----------------------------------------------

    def opened(self, request: GenerateRequest) -> None:
        """A request begins to hold blocks."""
        num_tokens = len(request.prompt_token_ids) + request.sampling.max_tokens
        num_blocks = -(-num_tokens // self._info.block_size)
        self._held[request.request_id] = num_blocks
        self._index.note_request(request.prompt_token_ids, namespace_of(request))
        totals = self._totals
        self._totals = msgspec.structs.replace(
            totals,
            prompt_tokens=totals.prompt_tokens + len(request.prompt_token_ids),
            allocated_blocks=totals.allocated_blocks + num_blocks,
        )
        self._rearm.set()

    def ended(self, request_id: str, cached_tokens: int, num_output: int, aborted: bool) -> None:
        """It holds none any more."""
        num_blocks = self._held.pop(request_id, 0)
        totals = self._totals
        self._totals = msgspec.structs.replace(
            totals,
            cached_prompt_tokens=totals.cached_prompt_tokens + cached_tokens,
            output_tokens=totals.output_tokens + num_output,
            aborts=totals.aborts + aborted,
            finished=totals.finished + (not aborted),
            freed_blocks=totals.freed_blocks + num_blocks,
        )

    def cached_blocks(self, request: GenerateRequest) -> int:
        """Return how many leading blocks of its prompt are believed to be cached."""
        return self._index.cached_blocks(request.prompt_token_ids, namespace_of(request))

    # --- what the contract asks for ----------------------------------------------------------------

    def holdings(self) -> Mapping[str, int]:
        """Return how many blocks each request holds, by our account."""
        return dict(self._held)

    def follow_events(self) -> AsyncIterator[KvEvent]:
        """Return a snapshot and every later event."""
        return self._events.follow()

    def stats(self) -> EngineStats:
        """Return load and counters now."""
        total = self._info.num_blocks
        newest = self._newest
        # An iteration's figures stand until the next one; an engine without requests makes none.
        held = sum(self._held.values())
        active = min(self._kv("usedNumBlocks") or held, held, total)
        cached = min(len(self._events), total - active)
        waiting = min(int(newest.get("numQueuedRequests") or 0), len(self._held))
        return msgspec.structs.replace(
            self._totals,
            num_running=len(self._held) - waiting,
            num_waiting=waiting,
            total_blocks=total,
            free_blocks=total - active - cached,
            cached_blocks=cached,
            active_blocks=active,
            num_steps=max(self._totals.num_steps, int(newest.get("iter") or 0)),
        )

    async def close(self) -> None:
        """Stop following."""
        while running := [task for task in self._tasks if not task.done()]:
            # More than once: a wait_for inside that has just got its result swallows a cancellation.
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=_CANCEL_AGAIN_S)
        self._events.close()


def namespace_of(request: GenerateRequest) -> str:
    """Return what separates a request's blocks from equal tokens of others, as it is in TensorRT-LLM."""
    return namespace(salt_of(request), request.lora)

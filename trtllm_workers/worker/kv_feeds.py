"""Tells KV events to whoever asked for them, and finds out whether there are any. Knows no router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog

from trtllm_workers.engines.base import Engine, generate
from trtllm_workers.errors import LaunchError, PeerLost
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.messages import EventsAsk, KvEvents
from trtllm_workers.types import (
    Address,
    EngineInfo,
    GenerateRequest,
    KvEvent,
    KvEventKind,
    SamplingParams,
)
from trtllm_workers.worker.canary import probe_prompt

log = structlog.get_logger(__name__)

# So many block hashes fill a frame; a token frame behind it waits for no longer than it takes to write.
_BLOCKS_PER_FRAME = 4096
# A peer that reads slowly is looked at again after so long; meanwhile the engine's log keeps the events.
_PAUSE_S = 0.01
# The first request of an engine may compile things.
PROOF_TIMEOUT_S = 60.0


class KvFeeds:
    """One subscription of the engine's KV events per process that asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._feeds: dict[Address, asyncio.Task[None]] = {}

    def ask(self, peer: Peer, message: EventsAsk) -> None:
        """Begin to tell a peer, with a snapshot; what it had asked for before ends."""
        self.forget(peer.address)
        feed = asyncio.create_task(
            self._tell(peer, message.turn), name=f"KV events to {peer.address}"
        )
        self._feeds[peer.address] = feed
        feed.add_done_callback(_look_at)

    def forget(self, address: Address) -> None:
        """Tell a process nothing more."""
        feed = self._feeds.pop(address, None)
        if feed is not None:
            feed.cancel()

    async def close(self) -> None:
        """End all subscriptions."""
        feeds, self._feeds = list(self._feeds.values()), {}
        for feed in feeds:
            feed.cancel()
        await asyncio.gather(*feeds, return_exceptions=True)

    async def _tell(self, peer: Peer, turn: int) -> None:
        """Send events as they come; those that are there at once share a frame."""
        outgoing = _Frames(peer, turn)
        events = self._engine.kv_events()
        try:
            async for event in events:
                outgoing.add(event)
                if outgoing.num_blocks >= _BLOCKS_PER_FRAME:
                    outgoing.flush()
                    while peer.write_paused:
                        await asyncio.sleep(_PAUSE_S)
        except PeerLost:
            return  # on_lost has told, or will
        finally:
            outgoing.drop()
            await _close(events)


class _Frames:
    """Gathers events of one loop iteration into a frame."""

    def __init__(self, peer: Peer, turn: int) -> None:
        self._peer = peer
        self._turn = turn
        self._events: list[KvEvent] = []
        self.num_blocks = 0
        self._flush_later: asyncio.Handle | None = None

    def add(self, event: KvEvent) -> None:
        self._events.append(event)
        self.num_blocks += 1 + len(event.block_hashes)
        if self._flush_later is None:
            self._flush_later = asyncio.get_running_loop().call_soon(self._flush_quietly)

    def flush(self) -> None:
        """Send what is gathered. Raises PeerLost."""
        if self._flush_later is not None:
            self._flush_later.cancel()
            self._flush_later = None
        events, self._events, self.num_blocks = self._events, [], 0
        if events:
            self._peer.send(KvEvents(self._turn, events))

    def _flush_quietly(self) -> None:
        self._flush_later = None
        try:
            self.flush()
        except PeerLost:
            return  # the feed ends when the connection's end is told

    def drop(self) -> None:
        if self._flush_later is not None:
            self._flush_later.cancel()


async def why_no_events(engine: Engine, info: EngineInfo) -> str:
    """Return why the engine's KV events cannot be relied on; "" when a stored block was announced.

    A prompt of our own is computed for it: an engine that says it publishes events may still send
    none, and a router that waits for them would send every prompt to the wrong worker without a word.
    """
    if not info.kv_events:
        setting = (
            ": kv_cache_config.event_buffer_max_size is 0 or enable_block_reuse is false"
            if info.engine == "trtllm"
            else ""
        )
        return f"engine {info.engine} publishes none{setting}"
    request = GenerateRequest(
        request_id="kv-events-proof",
        prompt_token_ids=probe_prompt(info),
        sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
        cache_salt="kv-events-proof",
    )
    if len(request.prompt_token_ids) <= info.block_size:
        return (
            f"max_seq_len {info.max_seq_len} leaves no room for a whole block of {info.block_size}"
        )
    events = engine.kv_events()
    try:
        async with asyncio.timeout(PROOF_TIMEOUT_S):
            async for _chunk in generate(engine, request):
                pass
            async for event in events:
                if event.kind is KvEventKind.STORED:
                    return ""
        return "the engine ended its events"
    except TimeoutError:
        return f"no event within {PROOF_TIMEOUT_S:g} s of a prompt that fills blocks"
    except LaunchError as error:
        return f"a prompt that should have made one failed: {error}"
    finally:
        await _close(events)


async def _close(events: AsyncIterator[KvEvent]) -> None:
    close = getattr(events, "aclose", None)  # engines give generators, the contract an iterator
    if close is not None:
        await close()


def _look_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("KV events failed", task=task.get_name(), exc_info=task.exception())

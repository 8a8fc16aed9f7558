"""Asks engines and keeps their answers, for the contract suite. Knows only the engine contract."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.contract.engines import VOCAB_SIZE, EngineKind
from trtllm_workers.blocks import block_hashes, root_hash
from trtllm_workers.engines.base import Engine
from trtllm_workers.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    KvEvent,
    KvEventKind,
    SamplingParams,
    TokenChunk,
)

DEADLINE_S = 30.0
_IDS = itertools.count()


def prompt_of(seed: int, length: int) -> list[int]:
    """Return ``length`` token ids that differ from those of any other seed."""
    return random.Random(seed).choices(range(3, VOCAB_SIZE), k=length)


def request_of(
    prompt: list[int], max_tokens: int = 8, *, cache_salt: str = "", **sampling: Any
) -> GenerateRequest:
    """Return a greedy request that ignores eos, unless ``sampling`` says otherwise."""
    fields = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id=f"request-{next(_IDS)}",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **fields),
        cache_salt=cache_salt,
    )


class Answer:
    """One stream's chunks. Records what the contract forbids in ``violations``."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.chunks: list[TokenChunk] = []
        self.tokens: list[int] = []
        self.violations: list[str] = []
        self.finish_reason: FinishReason | None = None
        self._changed = asyncio.Event()

    @property
    def last(self) -> TokenChunk:
        return self.chunks[-1]

    @property
    def cached_tokens(self) -> int:
        return self.chunks[0].cached_tokens

    def deliver(self, chunk: TokenChunk) -> None:
        if self.finish_reason is not None:
            self.violations.append(f"delivered after {self.finish_reason}: {chunk}")
        if not chunk.token_ids and chunk.finish_reason is None:
            self.violations.append(f"says nothing: {chunk}")
        if self.chunks and chunk.cached_tokens != self.cached_tokens:
            self.violations.append(f"cached_tokens changed: {self.chunks[0]} {chunk}")
        self.chunks.append(chunk)
        self.tokens.extend(chunk.token_ids)
        self.finish_reason = chunk.finish_reason
        self._changed.set()

    async def reaches(self, num_tokens: int) -> None:
        """Wait for so many tokens, or the end."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.tokens) < num_tokens and self.finish_reason is None:
                self._changed.clear()
                await self._changed.wait()

    async def end(self) -> Answer:
        """Wait for the end and return this answer; fails on whatever the contract forbids."""
        async with asyncio.timeout(DEADLINE_S):
            while self.finish_reason is None:
                self._changed.clear()
                await self._changed.wait()
        assert not self.violations
        return self


class Harness:
    """Builds engines of one kind over one checkpoint and closes all of them in the end."""

    def __init__(self, kind: EngineKind, model_path: Path) -> None:
        self.kind = kind
        self.model_path = model_path
        self.engines: list[Engine] = []

    def build(self, model_path: Path | None = None, **overrides: Any) -> Engine:
        engine = self.kind.build(model_path or self.model_path, **overrides)
        self.engines.append(engine)
        return engine

    async def start(self, **overrides: Any) -> Engine:
        return (await self.start_with_info(**overrides))[0]

    async def start_with_info(self, **overrides: Any) -> tuple[Engine, EngineInfo]:
        engine = self.build(**overrides)
        async with asyncio.timeout(DEADLINE_S):
            return engine, await engine.start()

    async def close(self) -> None:
        for engine in self.engines:
            async with asyncio.timeout(DEADLINE_S):
                await engine.close()


def ask(engine: Engine, prompt: list[int], max_tokens: int = 8, **options: Any) -> Answer:
    """Submit a request and return its answer, still growing."""
    answer = Answer(request_of(prompt, max_tokens, **options))
    engine.submit(answer.request, answer.deliver)
    return answer


async def tokens_of(
    engine: Engine, prompt: list[int], max_tokens: int = 8, **options: Any
) -> list[int]:
    """Return all tokens of one answer."""
    return (await ask(engine, prompt, max_tokens, **options).end()).tokens


class Replica:
    """What a reader of KV events believes the engine's cache to hold; checks every event."""

    def __init__(self) -> None:
        self.parents: dict[bytes, bytes | None] = {}
        self.seq = -1

    def apply(self, event: KvEvent) -> None:
        if event.kind is KvEventKind.CLEARED:
            self.parents.clear()
        elif event.kind is KvEventKind.REMOVED:
            assert event.block_hashes
            for digest in event.block_hashes:
                del self.parents[digest]
        else:
            assert event.block_hashes
            assert event.parent_hash is None or event.parent_hash in self.parents
            parent = event.parent_hash
            for digest in event.block_hashes:
                assert digest not in self.parents, "stored twice"
                self.parents[digest] = parent
                parent = digest
        self.seq = event.seq


class Follower:
    """Reads one subscription of KV events into a replica, checking order and numbers."""

    def __init__(self, engine: Engine) -> None:
        self.events: list[KvEvent] = []
        self.replica = Replica()
        self._in_snapshot = True
        self._stream: AsyncIterator[KvEvent] = engine.kv_events()

    async def next(self) -> KvEvent:
        """Return the next event; raises StopAsyncIteration when the engine closed."""
        async with asyncio.timeout(DEADLINE_S):
            event = await anext(self._stream)
        if not self.events:
            assert event.kind is KvEventKind.CLEARED
        elif self._in_snapshot and event.seq == self.replica.seq:
            assert event.kind is KvEventKind.STORED
        else:
            self._in_snapshot = False
            assert event.seq == self.replica.seq + 1, "a gap"
        self.replica.apply(event)
        self.events.append(event)
        return event

    async def until_stored(self, digest: bytes) -> None:
        """Read on until this block is stored."""
        while digest not in self.replica.parents:
            await self.next()

    async def close(self) -> None:
        aclose = getattr(self._stream, "aclose", None)
        if aclose is not None:
            await aclose()


def hashes_of(info: EngineInfo, prompt: list[int], cache_salt: str = "") -> list[bytes]:
    """Return the hashes of the prompt's full blocks."""
    return block_hashes(prompt, info.block_size, root_hash(info.model_id, cache_salt))


async def store_marker(engine: Engine, info: EngineInfo, seed: int) -> bytes:
    """Let the engine store a block nobody else has, and return its hash: an end mark for readers."""
    prompt = prompt_of(1_000_000 + seed, info.block_size + 1)
    await tokens_of(engine, prompt, 1)
    return hashes_of(info, prompt)[0]


def check_sum(stats: EngineStats) -> None:
    """Fail unless the block counts add up."""
    assert stats.free_blocks >= 0
    assert stats.cached_blocks >= 0
    assert stats.active_blocks >= 0
    assert stats.free_blocks + stats.cached_blocks + stats.active_blocks == stats.total_blocks
    assert max(stats.pinned_blocks, stats.reserved_blocks) <= stats.active_blocks
    assert stats.active_blocks <= stats.allocated_blocks - stats.freed_blocks


def check_idle(engine: Engine) -> None:
    """Fail unless no request and no active block is left."""
    stats = engine.stats()
    check_sum(stats)
    assert (stats.num_running, stats.num_waiting, stats.active_blocks) == (0, 0, 0)
    assert stats.allocated_blocks == stats.freed_blocks

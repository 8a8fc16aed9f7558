"""Drives handoffs between engines for the contract suite: prefill, copy, resume. Holds no test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tests.contract.harness import DEADLINE_S, Answer, check_sum, request_of
from trtllm_workers.engines.base import Engine
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.types import (
    EngineStats,
    GenerateRequest,
    Prefilled,
    Reservation,
    TokenChunk,
)

T = TypeVar("T")

# An engine takes in a call within two or three turns of the loop, or of its thread.
_MANY_TURNS = 20


class Once(Generic[T]):
    """What a callback gets that may be called a single time."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.results: list[T] = []
        self._came = asyncio.Event()

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def has_come(self) -> bool:
        return bool(self.results)

    def deliver(self, result: T) -> None:
        self.results.append(result)
        self._came.set()

    async def result(self) -> T:
        """Wait for the result; fails if there was more than one."""
        async with asyncio.timeout(DEADLINE_S):
            await self._came.wait()
        assert len(self.results) == 1
        return self.results[0]


def ask_prefill(engine: Engine, request: GenerateRequest) -> Once[Prefilled]:
    once: Once[Prefilled] = Once(request)
    engine.prefill(request, once.deliver)
    return once


def ask_reserve(engine: Engine, request: GenerateRequest) -> Once[Reservation]:
    once: Once[Reservation] = Once(request)
    engine.reserve(request, once.deliver)
    return once


def resume(engine: Engine, request: GenerateRequest, first: TokenChunk | None) -> Answer:
    """Let a reserved request go on, and return its answer, still growing."""
    answer = Answer(request)
    engine.resume(request.request_id, first, answer.deliver)
    return answer


def pool_of(engine: Engine) -> KvPool:
    pool = engine.kv_pool
    assert pool is not None
    return pool


def bytes_of(engine: Engine, blocks: tuple[int, ...]) -> list[bytes]:
    pool = pool_of(engine)
    return [bytes(pool.block(block)) for block in blocks]


def copy_kv(source: Engine, prefilled: Prefilled, target: Engine, reserved: Reservation) -> int:
    """Copy the blocks that are not cached at the target; return how many."""
    assert len(prefilled.block_ids) == len(reserved.block_ids)
    ours, theirs = pool_of(target), pool_of(source)
    pairs = list(zip(reserved.block_ids, prefilled.block_ids, strict=True))
    for local, remote in pairs[reserved.num_cached_blocks :]:
        ours.block(local)[:] = theirs.block(remote)
    return len(pairs) - reserved.num_cached_blocks


async def hand_over(
    source: Engine, target: Engine, prompt: list[int], max_tokens: int = 8, **options: Any
) -> Answer:
    """Prefill in one engine, decode in the other; return the answer, still growing."""
    request = request_of(prompt, max_tokens, **options)
    prefilled = await ask_prefill(source, request).result()
    if prefilled.first.finish_reason is not None:
        answer = Answer(request)
        answer.deliver(prefilled.first)
        return answer
    reserved = await ask_reserve(target, request).result()
    assert reserved.ended is None
    copy_kv(source, prefilled, target, reserved)
    source.release(request.request_id)
    return resume(target, request, prefilled.first)


async def settled(engine: Engine) -> None:
    """Let an engine that cannot go on find that out."""
    for _ in range(_MANY_TURNS):
        await engine.holdings()
        await asyncio.sleep(0)


async def stats_where(engine: Engine, wanted: Callable[[EngineStats], bool]) -> EngineStats:
    """Return the stats as soon as they are as wanted; an engine's thread may lag a little."""
    async with asyncio.timeout(DEADLINE_S):
        while not wanted(stats := engine.stats()):
            await engine.holdings()
            await asyncio.sleep(0)
    check_sum(stats)
    return stats


async def holds(engine: Engine, expected: dict[str, int]) -> None:
    """Wait until exactly these requests hold exactly so many blocks."""
    held: dict[str, int] = {}
    try:
        async with asyncio.timeout(DEADLINE_S):
            # The contract has no event for it.
            while (held := dict(await engine.holdings())) != expected:  # noqa: ASYNC110
                await asyncio.sleep(0)
    except TimeoutError:
        raise AssertionError(f"held: {held}, expected: {expected}") from None
    total = sum(expected.values())
    await stats_where(engine, lambda stats: stats.allocated_blocks - stats.freed_blocks == total)


async def holds_nothing(engine: Engine) -> None:
    """Wait until no request is left, and fail unless every counter says so."""
    await holds(engine, {})
    stats = await stats_where(
        engine,
        lambda stats: (stats.num_running, stats.num_waiting, stats.active_blocks) == (0,) * 3,
    )
    assert (stats.pinned_blocks, stats.reserved_blocks) == (0, 0)

"""Handoffs through the engine: what callers are told, in every phase and at the end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.torch_engine.driver import prompt_of, request_of
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.base import EngineOptions, generate
from trtllm_workers.engines.torch.core import Core
from trtllm_workers.engines.torch.engine import TorchEngine
from trtllm_workers.engines.torch.scheduler import Scheduler
from trtllm_workers.engines.torch.settings import KEYS
from trtllm_workers.errors import EngineDead, EngineError, RequestError
from trtllm_workers.types import FinishReason, GenerateRequest, Prefilled, Reservation, TokenChunk

Make = Callable[..., TorchEngine]


@pytest.fixture
async def engine(model_folder: Callable[[str], Path]) -> AsyncIterator[TorchEngine]:
    settings = {"kv_cache_config__tokens_per_block": 16, "kv_cache_config__max_tokens": 20 * 16}
    config = default_config("torch", KEYS, **settings)
    built = TorchEngine(EngineOptions(model_folder("llama"), config))
    await built.start()
    yield built
    await built.close()


class Told:
    """What one request was told."""

    def __init__(self) -> None:
        self.all: list[Any] = []
        self._more = asyncio.Event()

    def __call__(self, result: Any) -> None:
        self.all.append(result)
        self._more.set()

    async def number(self, index: int) -> Any:
        async with asyncio.timeout(10):
            while len(self.all) <= index:
                self._more.clear()
                await self._more.wait()
        return self.all[index]

    async def rest(self, index: int = 0) -> list[TokenChunk]:
        chunks = [await self.number(index)]
        while chunks[-1].finish_reason is None:
            chunks.append(await self.number(index + len(chunks)))
        return chunks


def prefill(engine: TorchEngine, length: int = 40, **sampling: Any) -> tuple[GenerateRequest, Told]:
    request, told = request_of(prompt_of(length, length), **sampling), Told()
    engine.prefill(request, told)
    return request, told


def reserve(engine: TorchEngine, length: int = 40, **sampling: Any) -> tuple[GenerateRequest, Told]:
    request, told = request_of(prompt_of(length, length), **sampling), Told()
    engine.reserve(request, told)
    return request, told


async def test_a_prompt_moves_within_one_pool(engine: TorchEngine) -> None:
    expected = [
        t async for c in generate(engine, request_of(prompt_of(40, 40))) for t in c.token_ids
    ]
    request, told = prefill(engine, 40, max_tokens=12)
    made: Prefilled = await told.number(0)
    wanted, reserving = reserve(engine, 40, cache_salt="other")
    room: Reservation = await reserving.number(0)
    assert room.num_cached_blocks == 0
    assert await engine.holdings() == {request.request_id: 3, wanted.request_id: 3}
    stats = engine.stats()
    assert (stats.pinned_blocks, stats.reserved_blocks, stats.active_blocks) == (3, 3, 6)
    pool = engine.kv_pool
    assert pool is not None
    for ours, theirs in zip(made.block_ids, room.block_ids, strict=True):
        pool.block(theirs)[:] = pool.block(ours)
    engine.release(request.request_id)
    stream = Told()
    engine.resume(wanted.request_id, made.first, stream)
    assert stream.all == []  # not from within the call
    chunks = await stream.rest()
    assert chunks[0] is made.first
    assert [t for c in chunks for t in c.token_ids] == expected
    await engine.holdings()
    stats = engine.stats()
    assert (stats.active_blocks, stats.allocated_blocks) == (0, stats.freed_blocks)
    assert await engine.holdings() == {}


async def test_ids_that_are_held_cannot_be_used_again_until_let_go(engine: TorchEngine) -> None:
    request, told = prefill(engine)
    await told.number(0)
    with pytest.raises(RequestError, match="running already"):
        engine.submit(request, Told())
    engine.release(request.request_id)
    again = Told()
    engine.submit(request, again)
    assert (await again.rest())[-1].finish_reason is FinishReason.LENGTH
    assert len(told.all) == 1


async def test_aborts_before_the_answer_are_told_and_after_it_are_not(engine: TorchEngine) -> None:
    prefilled, told_early = prefill(engine)
    engine.abort(prefilled.request_id)
    reserved, reserving_early = reserve(engine)
    engine.abort(reserved.request_id)
    assert (await told_early.number(0)).first.finish_reason is FinishReason.ABORT
    assert (await reserving_early.number(0)).ended.finish_reason is FinishReason.ABORT
    pinned, told = prefill(engine)
    held, reserving = reserve(engine, 60)
    await told.number(0)
    await reserving.number(0)
    for request in (pinned, held):
        engine.abort(request.request_id)
        engine.abort(request.request_id)
    assert await engine.holdings() == {}
    with pytest.raises(EngineError, match="holds no reservation"):
        engine.resume(held.request_id, None, Told())
    await engine.holdings()
    assert (len(told.all), len(reserving.all)) == (1, 1)
    assert engine.stats().active_blocks == 0


async def test_resume_refuses_what_no_stream_could_go_on_from(engine: TorchEngine) -> None:
    request, reserving = reserve(engine, 20, max_tokens=3)
    with pytest.raises(EngineError, match="holds no reservation"):
        engine.resume(request.request_id, None, Told())  # has no blocks yet
    await reserving.number(0)
    for tokens in ((), (1, 2, 3), (-1,), (512,)):
        with pytest.raises(EngineError, match=r"1 to 2 of them, ids 0 to 511; .* same model"):
            engine.resume(request.request_id, TokenChunk(tokens), Told())
    with pytest.raises(EngineError, match="unknown"):
        engine.resume("unknown", None, Told())
    stream = Told()
    engine.resume(request.request_id, None, stream)
    assert len(await stream.rest()) == 3


async def test_a_first_chunk_that_ends_the_stream_is_delivered_and_frees_the_blocks(
    engine: TorchEngine,
) -> None:
    request, reserving = reserve(engine)
    await reserving.number(0)
    stream = Told()
    engine.resume(request.request_id, TokenChunk((7,), FinishReason.STOP), stream)
    assert [c.finish_reason for c in await stream.rest()] == [FinishReason.STOP]
    assert await engine.holdings() == {}
    assert len(stream.all) == 1


async def test_the_thread_sleeps_while_all_wait_for_what_is_held(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, told = prefill(engine, 250)
    await told.number(0)
    waiting, stream = request_of(prompt_of(1, 120)), Told()
    engine.submit(waiting, stream)
    await engine.holdings()
    plans = 0
    plan = Core.plan

    def counted(core: Core[Any]) -> Any:
        nonlocal plans
        plans += 1
        return plan(core)

    monkeypatch.setattr(Core, "plan", counted)
    for _ in range(20):
        assert await engine.holdings() == {pinned.request_id: 16}
    assert plans == 0
    assert stream.all == []
    assert engine.stats().num_waiting == 1
    engine.release(pinned.request_id)
    assert (await stream.rest())[-1].finish_reason is FinishReason.LENGTH


async def test_close_and_death_end_what_is_open_and_forget_what_is_held(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pinned, told = prefill(engine)
    held, reserving = reserve(engine)
    await told.number(0)
    await reserving.number(0)

    def broken(_scheduler: Scheduler) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(Scheduler, "plan", broken)
    _late, dying = prefill(engine)
    _later, dying_too = reserve(engine)
    assert (await dying.number(0)).first.error_code == "engine_dead"
    assert (await dying_too.number(0)).ended.error_code == "engine_dead"
    await engine.died()
    assert await engine.holdings() == {}
    with pytest.raises(EngineDead):
        engine.resume(held.request_id, None, Told())
    await engine.close()
    assert engine.kv_pool is None
    assert (len(told.all), len(reserving.all)) == (1, 1)


async def test_any_interleaving_of_calls_ends_with_no_block_held(engine: TorchEngine) -> None:
    rng = random.Random(5)
    held: list[tuple[str, str, Told]] = []
    streams: list[Told] = []
    for _ in range(120):
        length = rng.randint(1, 150)
        act = rng.choice(("submit", "prefill", "reserve", "go on", "go on", "abort"))
        if act == "submit":
            told = Told()
            request = request_of(prompt_of(length % 3, length), rng.randint(1, 9))
            engine.submit(request, told)
            streams.append(told)
            if rng.random() < 0.3:
                engine.abort(request.request_id)
        elif act in ("prefill", "reserve"):
            request, told = (prefill if act == "prefill" else reserve)(engine, length)
            held.append((act, request.request_id, told))
        elif held:
            kind, request_id, told = held.pop(rng.randrange(len(held)))
            if act == "abort":
                engine.abort(request_id)
            elif not told.all:
                held.append((kind, request_id, told))
                await engine.holdings()  # let the thread get on
            elif kind == "prefill":
                engine.release(request_id)
            else:
                stream = Told()
                first = TokenChunk((rng.randrange(512),)) if rng.random() < 0.6 else None
                engine.resume(request_id, first, stream)
                streams.append(stream)
    for kind, request_id, told in held:
        if kind == "prefill" and told.all:
            engine.release(request_id)
        else:
            engine.abort(request_id)
    for stream in streams:
        await stream.rest()
    assert await engine.holdings() == {}
    await engine.holdings()
    stats = engine.stats()
    assert (stats.active_blocks, stats.pinned_blocks, stats.reserved_blocks) == (0, 0, 0)
    assert stats.allocated_blocks == stats.freed_blocks
    assert (stats.num_running, stats.num_waiting) == (0, 0)

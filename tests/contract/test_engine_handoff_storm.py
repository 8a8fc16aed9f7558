"""The engine contract, part 7: a storm of requests, handoffs and aborts. Runs on every engine."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from tests.contract.engines import BLOCK_SIZE, POOL_KINDS, EngineKind
from tests.contract.handoffs import ask_prefill, ask_reserve, copy_kv, holds_nothing, resume
from tests.contract.harness import (
    DEADLINE_S,
    Answer,
    Harness,
    ask,
    check_sum,
    prompt_of,
    request_of,
    tokens_of,
)
from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import EngineError
from trtllm_workers.types import FinishReason, GenerateRequest

SUBJECTS = [prompt_of(200 + i, length) for i, length in enumerate((1, 15, 16, 17, 33, 48, 60, 97))]
LONGEST = 30


class Storm:
    """Random work on two engines; every wait in it is for an engine that owes an answer."""

    def __init__(self, source: Engine, target: Engine, expected: list[list[int]]) -> None:
        self.source = source
        self.target = target
        self.expected = expected
        self.num_whole = 0

    async def one(self, seed: int) -> None:
        chance = random.Random(seed)
        which = chance.randrange(len(SUBJECTS))
        request = request_of(SUBJECTS[which], chance.randint(1, LONGEST))
        work = chance.choice([self.submit, self.prefill_only, self.reserve_only, *[self.both] * 3])
        answer = await work(chance, request)
        if answer is None:
            return
        await answer.end()
        tokens = self.expected[which][: request.sampling.max_tokens]
        if answer.finish_reason is FinishReason.ABORT:
            assert answer.tokens == tokens[: len(answer.tokens)]
        else:
            assert answer.tokens == tokens
            self.num_whole += 1

    async def submit(self, chance: random.Random, request: GenerateRequest) -> Answer | None:
        engine = chance.choice([self.source, self.target])
        answer = ask(engine, request.prompt_token_ids, request.sampling.max_tokens)
        await self.maybe_abort(chance, engine, answer)
        return answer

    async def prefill_only(self, chance: random.Random, request: GenerateRequest) -> Answer | None:
        once = ask_prefill(self.source, request)
        if chance.random() < 0.3:
            await self.source.holdings()
            self.source.abort(once.request_id)
        await once.result()
        for _ in range(chance.randrange(3)):
            await self.source.holdings()
        chance.choice([self.source.release, self.source.abort])(once.request_id)
        return None

    async def reserve_only(self, chance: random.Random, request: GenerateRequest) -> Answer | None:
        once = ask_reserve(self.target, request)
        if chance.random() < 0.3:
            await self.target.holdings()
            self.target.abort(once.request_id)
        reserved = await once.result()
        if reserved.ended is not None or chance.random() < 0.3:
            self.target.abort(once.request_id)
            return None
        try:
            answer = resume(self.target, request, None)
        except EngineError:  # aborted above, after it was reserved
            return None
        await self.maybe_abort(chance, self.target, answer)
        return answer

    async def both(self, chance: random.Random, request: GenerateRequest) -> Answer | None:
        prefilled = await ask_prefill(self.source, request).result()
        if prefilled.first.finish_reason is not None:
            answer = Answer(request)
            answer.deliver(prefilled.first)
            return answer
        once = ask_reserve(self.target, request)
        if chance.random() < 0.1:
            self.target.abort(once.request_id)
        reserved = await once.result()
        if reserved.ended is not None:
            self.source.abort(once.request_id)
            return None
        copy_kv(self.source, prefilled, self.target, reserved)
        if chance.random() < 0.5:
            await self.source.holdings()
        self.source.release(once.request_id)
        failed = chance.random() < 0.2  # a transfer that failed: decode computes it all
        answer = resume(self.target, request, None if failed else prefilled.first)
        await self.maybe_abort(chance, self.target, answer)
        return answer

    async def maybe_abort(self, chance: random.Random, engine: Engine, answer: Answer) -> None:
        if chance.random() < 0.3:
            await answer.reaches(chance.randrange(LONGEST // 2))
            engine.abort(answer.request.request_id)


@pytest.fixture(params=POOL_KINDS, ids=[kind.name for kind in POOL_KINDS])
def engine_kind(request: pytest.FixtureRequest) -> EngineKind:
    """Each engine whose blocks are moved from outside."""
    kind: EngineKind = request.param
    return kind


async def test_a_storm_of_handoffs_leaves_no_block_held(harness: Harness) -> None:
    alone = await harness.start()
    expected = [await tokens_of(alone, prompt, LONGEST) for prompt in SUBJECTS]
    pool: dict[str, Any] = {"kv_cache_config__max_tokens": 16 * BLOCK_SIZE}
    source = await harness.start(max_num_tokens=40, **pool)
    target = await harness.start(max_num_tokens=64, **pool)
    storm = Storm(source, target, expected)
    at_once = asyncio.Semaphore(16)

    async def limited(seed: int) -> None:
        async with at_once:
            await storm.one(seed)
            check_sum(source.stats())
            check_sum(target.stats())

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        for seed in range(300):
            tasks.create_task(limited(seed))
    await holds_nothing(source)
    await holds_nothing(target)
    assert storm.num_whole > 100
    for engine in (source, target):
        for prompt, tokens in zip(SUBJECTS, expected, strict=True):
            assert await tokens_of(engine, prompt, LONGEST) == tokens  # nothing wrong is cached

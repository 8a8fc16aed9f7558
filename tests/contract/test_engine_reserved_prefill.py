"""The engine contract, part 6: prefill of a reserved request whose leading blocks were brought."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.contract.engines import BLOCK_SIZE, KINDS, POOL_KINDS, EngineKind
from tests.contract.handoffs import (
    Once,
    ask_prefill,
    ask_reserve,
    copy_kv,
    holds,
    holds_nothing,
    pool_of,
    resume,
)
from tests.contract.harness import Harness, ask, prompt_of, request_of, tokens_of
from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import EngineError
from trtllm_workers.types import FinishReason, GenerateRequest, Prefilled

LENGTHS = (1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 50, 97)
OUTPUT = 16
POOL = 4096
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 11}


@pytest.fixture(params=POOL_KINDS, ids=[kind.name for kind in POOL_KINDS])
def engine_kind(request: pytest.FixtureRequest) -> EngineKind:
    kind: EngineKind = request.param
    return kind


def ask_prefill_reserved(
    engine: Engine, request: GenerateRequest, num_filled: int
) -> Once[Prefilled]:
    once: Once[Prefilled] = Once(request)
    engine.prefill_reserved(request.request_id, num_filled, once.deliver)
    return once


async def engines(harness: Harness, count: int = 3, **more: Any) -> list[Engine]:
    settings = {"max_num_tokens": 33, "kv_cache_config__max_tokens": POOL, **more}
    return [await harness.start(**settings) for _ in range(count)]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("cached", ["nowhere", "prefill", "decode"])
async def test_brought_blocks_give_the_tokens_of_submit(
    harness: Harness, sampling: dict[str, Any], cached: str
) -> None:
    """As the prefill queue does it: decode's blocks are brought, the rest is written back there."""
    aggregated, prefill, decode = await engines(harness)
    for number, length in enumerate(LENGTHS):
        prompt = prompt_of(number, length)
        expected = await tokens_of(aggregated, prompt, OUTPUT, **sampling)
        if cached != "nowhere":
            await tokens_of(prefill if cached == "prefill" else decode, prompt, 1)
        request = request_of(prompt, OUTPUT, **sampling)
        theirs = await ask_reserve(decode, request).result()
        ours = await ask_reserve(prefill, request).result()
        most = (length - 1) // BLOCK_SIZE
        num_filled = max(ours.num_cached_blocks, min(theirs.num_cached_blocks, most))
        assert num_filled == (most if cached != "nowhere" else 0)
        for index in range(ours.num_cached_blocks, num_filled):
            source = pool_of(decode).block(theirs.block_ids[index])
            pool_of(prefill).block(ours.block_ids[index])[:] = source
        prefilled = await ask_prefill_reserved(prefill, request, num_filled).result()
        assert prefilled.num_tokens == length
        assert prefilled.first.cached_tokens == num_filled * BLOCK_SIZE
        assert prefilled.compute_s >= 0
        copy_kv(prefill, prefilled, decode, theirs)
        prefill.release(request.request_id)
        assert (await resume(decode, request, prefilled.first).end()).tokens == expected
        # What was brought is shared from now on, and is right.
        again = await ask(prefill, prompt, OUTPUT, **sampling).end()
        assert again.tokens == expected
        assert again.cached_tokens == most * BLOCK_SIZE
    for engine in (prefill, decode):
        await holds_nothing(engine)


async def test_every_number_of_filled_blocks_gives_the_same_token(harness: Harness) -> None:
    source, target = await engines(harness, 2, kv_cache_config__enable_block_reuse=False)
    prompt = prompt_of(1, 97)
    whole = request_of(prompt, OUTPUT)
    kept = await ask_prefill(source, whole).result()
    for num_filled in range(97 // BLOCK_SIZE + 1):
        request = request_of(prompt, OUTPUT)
        ours = await ask_reserve(target, request).result()
        for index in range(num_filled):
            block = pool_of(source).block(kept.block_ids[index])
            pool_of(target).block(ours.block_ids[index])[:] = block
        prefilled = await ask_prefill_reserved(target, request, num_filled).result()
        assert prefilled.first.token_ids == kept.first.token_ids
        assert len(prefilled.block_ids) == len(kept.block_ids)
        target.release(request.request_id)
    source.release(whole.request_id)
    await holds_nothing(target)


async def test_wrong_blocks_give_other_tokens(harness: Harness) -> None:
    """So that whoever brings them wrongly is found out by a comparison of tokens."""
    aggregated, prefill = await engines(harness, 2)
    prompt = prompt_of(1, 97)
    expected = await tokens_of(aggregated, prompt, 1)
    wrong = 0
    for number in range(8):
        request = request_of(prompt, 8, cache_salt=str(number))
        ours = await ask_reserve(prefill, request).result()
        for block_id in ours.block_ids[:6]:
            block = pool_of(prefill).block(block_id)
            block[:] = bytes([number + 1]) * len(block)
        prefilled = await ask_prefill_reserved(prefill, request, 6).result()
        wrong += list(prefilled.first.token_ids) != expected
        prefill.release(request.request_id)
    assert wrong >= 6


async def test_requests_side_by_side_do_not_disturb_each_other(harness: Harness) -> None:
    aggregated, prefill, decode = await engines(harness)
    prompts = [prompt_of(number, 20 + 11 * number) for number in range(6)]
    expected = [await tokens_of(aggregated, prompt, OUTPUT) for prompt in prompts]
    mates = [ask(prefill, prompt_of(100 + number, 40), OUTPUT) for number in range(3)]

    async def one(prompt: list[int]) -> list[int]:
        request = request_of(prompt, OUTPUT)
        theirs = await ask_reserve(decode, request).result()
        await ask_reserve(prefill, request).result()
        prefilled = await ask_prefill_reserved(prefill, request, 0).result()
        copy_kv(prefill, prefilled, decode, theirs)
        prefill.release(request.request_id)
        return (await resume(decode, request, prefilled.first).end()).tokens

    assert await asyncio.gather(*map(one, prompts)) == expected
    for mate in mates:
        await mate.end()
    await holds_nothing(prefill)
    await holds_nothing(decode)


async def test_a_request_that_ends_with_its_first_token_holds_nothing(harness: Harness) -> None:
    (engine,) = await engines(harness, 1)
    request = request_of(prompt_of(1, 40), 1)
    await ask_reserve(engine, request).result()
    prefilled = await ask_prefill_reserved(engine, request, 0).result()
    assert prefilled.first.finish_reason is FinishReason.LENGTH
    assert prefilled.block_ids == ()
    await holds_nothing(engine)


async def test_an_abort_before_it_is_done_ends_it(harness: Harness) -> None:
    (engine,) = await engines(harness, 1)
    request = request_of(prompt_of(1, 200), 8)
    await ask_reserve(engine, request).result()
    asked = ask_prefill_reserved(engine, request, 0)
    engine.abort(request.request_id)
    assert (await asked.result()).first.finish_reason is FinishReason.ABORT
    await holds_nothing(engine)


async def test_a_pinned_one_is_held_until_released_and_aborted_without_a_word(
    harness: Harness,
) -> None:
    (engine,) = await engines(harness, 1)
    for end in (engine.release, engine.abort):
        request = request_of(prompt_of(1, 40), 8)
        await ask_reserve(engine, request).result()
        await ask_prefill_reserved(engine, request, 0).result()
        await holds(engine, {request.request_id: 3})
        end(request.request_id)
        await holds_nothing(engine)


async def test_what_cannot_be_is_refused_and_changes_nothing(harness: Harness) -> None:
    (engine,) = await engines(harness, 1)
    request = request_of(prompt_of(1, 2 * BLOCK_SIZE), 8)
    with pytest.raises(EngineError, match="reserve"):
        ask_prefill_reserved(engine, request, 0)
    await ask_reserve(engine, request).result()
    for num_filled in (-1, 2, 3):
        with pytest.raises(EngineError, match="must be computed: 0 to 1 may be filled"):
            ask_prefill_reserved(engine, request, num_filled)
    prefilled = await ask_prefill_reserved(engine, request, 0).result()
    assert prefilled.first.finish_reason is None
    with pytest.raises(EngineError):
        ask_prefill_reserved(engine, request, 0)
    engine.release(request.request_id)
    await holds_nothing(engine)


@pytest.mark.parametrize("engine_kind", [k for k in KINDS if k.moves_own_kv], ids=lambda k: k.name)
async def test_an_engine_that_moves_its_own_kv_says_so(harness: Harness) -> None:
    engine = await harness.start()
    with pytest.raises(EngineError, match="moves its own KV"):
        engine.prefill_reserved("r", 0, lambda _prefilled: None)

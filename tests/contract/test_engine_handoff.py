"""The engine contract, part 5: prefill here, decode there, with the tokens of one engine alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.contract.engines import BLOCK_SIZE, POOL_KINDS, VOCAB_SIZE, EngineKind
from tests.contract.handoffs import (
    ask_prefill,
    ask_reserve,
    bytes_of,
    copy_kv,
    hand_over,
    holds,
    holds_nothing,
    pool_of,
    resume,
    settled,
    stats_where,
)
from tests.contract.harness import (
    DEADLINE_S,
    Answer,
    Follower,
    Harness,
    ask,
    hashes_of,
    prompt_of,
    request_of,
    store_marker,
    tokens_of,
)
from trtllm_workers.engines.base import Engine
from trtllm_workers.types import FinishReason

# Less than a block, exactly one and two, more than one step of the prefill engine takes (33).
LENGTHS = (1, 5, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 50, 97)
OUTPUT = 24
POOL = 4096
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 11}


@pytest.fixture(params=POOL_KINDS, ids=[kind.name for kind in POOL_KINDS])
def engine_kind(request: pytest.FixtureRequest) -> EngineKind:
    """Each engine whose blocks are moved from outside."""
    kind: EngineKind = request.param
    return kind


def num_blocks(length: int) -> int:
    return -(-length // BLOCK_SIZE)


def prompts() -> list[list[int]]:
    return [prompt_of(i, length) for i, length in enumerate(LENGTHS)]


async def alone(harness: Harness, which: Sequence[list[int]], **sampling: Any) -> list[list[int]]:
    """Return the answers of an engine that does everything itself, one request at a time."""
    engine = await harness.start(
        kv_cache_config__enable_block_reuse=False, kv_cache_config__max_tokens=POOL
    )
    return [await tokens_of(engine, prompt, OUTPUT, **sampling) for prompt in which]


async def pair(harness: Harness, **decode: Any) -> tuple[Engine, Engine]:
    """Return a prefill engine that works in small steps, and a decode engine."""
    prefill = await harness.start(max_num_tokens=33, kv_cache_config__max_tokens=POOL)
    return prefill, await harness.start(**{"kv_cache_config__max_tokens": POOL, **decode})


@pytest.fixture(params=[{}, SAMPLED], ids=["greedy", "seeded"])
def sampling(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


# --- the tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", ["nowhere", "prefill", "decode", "both"])
async def test_a_handoff_gives_the_tokens_of_submit(
    harness: Harness, sampling: dict[str, Any], cached: str
) -> None:
    expected = await alone(harness, prompts(), **sampling)
    prefill, decode = await pair(harness)
    for engine, name in ((prefill, "prefill"), (decode, "decode")):
        if cached in (name, "both"):
            for prompt in prompts():
                await tokens_of(engine, prompt, 1)
    for prompt, tokens in zip(prompts(), expected, strict=True):
        request = request_of(prompt, OUTPUT, **sampling)
        prefilled = await ask_prefill(prefill, request).result()
        assert prefilled.num_tokens == len(prompt)
        assert len(prefilled.block_ids) == num_blocks(len(prompt))
        whole = (len(prompt) - 1) // BLOCK_SIZE
        hit = cached in ("prefill", "both")
        assert prefilled.first.cached_tokens == whole * BLOCK_SIZE * hit
        reserved = await ask_reserve(decode, request).result()
        assert reserved.ended is None
        assert len(reserved.block_ids) == num_blocks(len(prompt))
        if cached in ("decode", "both"):
            # The last block may be taken from the cache too where it is full.
            assert whole <= reserved.num_cached_blocks <= len(prompt) // BLOCK_SIZE
        else:
            assert reserved.num_cached_blocks == 0
        copied = copy_kv(prefill, prefilled, decode, reserved)
        assert copied == num_blocks(len(prompt)) - reserved.num_cached_blocks
        prefill.release(request.request_id)
        answer = await resume(decode, request, prefilled.first).end()
        assert answer.tokens == tokens
        assert answer.chunks[0] == prefilled.first
        assert answer.finish_reason is FinishReason.LENGTH
    await holds_nothing(prefill)
    await holds_nothing(decode)


async def test_a_handoff_among_batch_mates_gives_the_tokens_of_submit(
    harness: Harness, sampling: dict[str, Any]
) -> None:
    expected = await alone(harness, prompts(), **sampling)
    mate_prompts = [prompt_of(100 + i, 3 + 17 * i) for i in range(4)]
    mate_tokens = await alone(harness, mate_prompts)
    prefill, decode = await pair(harness)
    mates: list[Answer] = []
    for engine in (prefill, decode):
        mates += [ask(engine, prompt, OUTPUT) for prompt in mate_prompts]
    answers = await asyncio.gather(
        *(hand_over(prefill, decode, prompt, OUTPUT, **sampling) for prompt in prompts())
    )
    assert [(await answer.end()).tokens for answer in answers] == expected
    assert [(await mate.end()).tokens for mate in mates] == mate_tokens * 2
    await holds_nothing(prefill)
    await holds_nothing(decode)


async def test_a_handoff_honours_every_field_that_looks_back(harness: Harness) -> None:
    prefill, decode = await pair(harness)
    aggregated, info = await harness.start_with_info()
    wanted: dict[str, Any] = {
        "temperature": 0.9,
        "seed": 3,
        "repetition_penalty": 1.4,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
        "min_tokens": 6,
        "logprobs": 2,
        "logit_bias": ((7, 1.5),),
    }
    fields = {name: value for name, value in wanted.items() if name in info.capabilities}
    prompt = prompt_of(0, 40)
    full = await tokens_of(aggregated, prompt, OUTPUT, **fields)
    fields["stop_token_ids"] = (full[0], full[8])
    expected = await ask(aggregated, prompt, OUTPUT, **fields).end()
    found = await (await hand_over(prefill, decode, prompt, OUTPUT, **fields)).end()
    assert found.tokens == expected.tokens
    assert found.finish_reason is expected.finish_reason
    assert found.last.stop_token_id == expected.last.stop_token_id
    assert [chunk.logprobs for chunk in found.chunks] == [c.logprobs for c in expected.chunks]


async def test_a_cache_salt_goes_with_the_handoff(harness: Harness) -> None:
    prefill, decode = await pair(harness)
    prompt = prompt_of(0, 50)
    expected = (await alone(harness, [prompt]))[0]
    await tokens_of(decode, prompt, 1, cache_salt="other")
    request = request_of(prompt, OUTPUT, cache_salt="mine")
    prefilled = await ask_prefill(prefill, request).result()
    reserved = await ask_reserve(decode, request).result()
    assert reserved.num_cached_blocks == 0
    copy_kv(prefill, prefilled, decode, reserved)
    assert (await resume(decode, request, prefilled.first).end()).tokens == expected
    assert (await ask(decode, prompt, 1).end()).cached_tokens == 0
    assert (await ask(decode, prompt, 1, cache_salt="mine").end()).cached_tokens == 48


async def test_handoffs_of_one_prompt_at_the_same_time_do_not_disturb_each_other(
    harness: Harness,
) -> None:
    prefill, decode = await pair(harness)
    prompt = prompt_of(0, 50)
    expected = (await alone(harness, [prompt]))[0]
    requests = [request_of(prompt, OUTPUT) for _ in range(3)]
    prefilled = [await ask_prefill(prefill, request).result() for request in requests]
    reserved = [await ask_reserve(decode, request).result() for request in requests]
    written = [block for one in reserved for block in one.block_ids[one.num_cached_blocks :]]
    assert len(set(written)) == len(written)
    for source, target in zip(prefilled, reserved, strict=True):
        copy_kv(prefill, source, decode, target)
    answers = [
        resume(decode, request, source.first)
        for request, source in zip(requests, prefilled, strict=True)
    ]
    for request, answer in zip(requests, answers, strict=True):
        assert (await answer.end()).tokens == expected
        prefill.release(request.request_id)
    await holds_nothing(prefill)
    await holds_nothing(decode)


async def test_a_resumed_stream_that_is_preempted_has_the_same_tokens(
    harness: Harness, sampling: dict[str, Any]
) -> None:
    longest = [prompt_of(i, 40 + i) for i in range(6)]
    expected = await alone(harness, longest, **sampling)
    prefill, decode = await pair(harness, kv_cache_config__max_tokens=13 * BLOCK_SIZE)
    for _ in range(2):  # the second time with whatever is cached
        answers = await asyncio.gather(
            *(hand_over(prefill, decode, prompt, OUTPUT, **sampling) for prompt in longest)
        )
        assert [(await answer.end()).tokens for answer in answers] == expected
    assert decode.stats().preemptions > 0
    await holds_nothing(decode)


@pytest.mark.parametrize("cached", [False, True])
async def test_resume_with_nothing_brought_equals_submit(
    harness: Harness, sampling: dict[str, Any], cached: bool
) -> None:
    expected = await alone(harness, prompts(), **sampling)
    engine = await harness.start(max_num_tokens=33, kv_cache_config__max_tokens=POOL)
    mate = ask(engine, prompt_of(100, 20), 200)
    if cached:
        for prompt in prompts():
            await tokens_of(engine, prompt, 1)
    answers = []
    for prompt in prompts():
        request = request_of(prompt, OUTPUT, **sampling)
        reserved = await ask_reserve(engine, request).result()
        for block in reserved.block_ids[reserved.num_cached_blocks :]:
            # Half a transfer that failed: nothing of it may be used.
            pool_of(engine).block(block)[::3] = b"\xfe" * len(pool_of(engine).block(block)[::3])
        answers.append(resume(engine, request, None))
    assert [(await answer.end()).tokens for answer in answers] == expected
    if cached:
        whole = [(len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in prompts()]
        assert [answer.cached_tokens for answer in answers] == whole
    await mate.end()
    await holds_nothing(engine)


# --- the prefill side --------------------------------------------------------------------------


async def test_the_pool_is_the_memory_of_all_blocks(harness: Harness) -> None:
    engine, info = await harness.start_with_info()
    pool = pool_of(engine)
    assert pool.layout == info.layout
    assert pool.layout.block_size == info.block_size
    assert pool.num_blocks == info.num_blocks
    memory = pool.memory
    assert (memory.format, memory.ndim, memory.readonly) == ("B", 1, False)
    assert len(memory) == pool.num_blocks * pool.layout.block_bytes
    assert len(pool.block(pool.num_blocks - 1)) == pool.layout.block_bytes


@pytest.mark.parametrize("how", ["one token", "stop id", "eos"])
async def test_a_request_that_ends_with_its_first_token_pins_nothing(
    harness: Harness, tmp_path: Path, how: str
) -> None:
    prompt = prompt_of(0, 40)
    if how == "eos":
        folder = tmp_path / "eos" / "model"
        harness.kind.write_checkpoint(folder, list(range(0, VOCAB_SIZE, 2)))
        engine = harness.build(folder, often_eos=True)
        async with asyncio.timeout(DEADLINE_S):
            await engine.start()
    else:
        engine = await harness.start()
    token = (await tokens_of(engine, prompt, 1))[0]
    for seed in range(64):
        options: dict[str, Any] = {}
        if how == "stop id":
            options["stop_token_ids"] = (token,)
        elif how == "eos":
            options.update(temperature=1.0, seed=seed, ignore_eos=False)
        request = request_of(prompt, 1 if how == "one token" else 8, **options)
        prefilled = await ask_prefill(engine, request).result()
        if prefilled.first.finish_reason is not None:
            break
        engine.release(request.request_id)
    reason = FinishReason.LENGTH if how == "one token" else FinishReason.STOP
    assert prefilled.first.finish_reason is reason
    assert prefilled.first.token_ids == ((token,) if how == "one token" else ())
    assert prefilled.first.num_hidden_tokens == (how != "one token")
    assert prefilled.block_ids == ()
    engine.release(request.request_id)
    await holds_nothing(engine)


async def test_pinned_blocks_survive_pressure_and_do_not_change(harness: Harness) -> None:
    prompt = prompt_of(0, 50)
    expected = (await alone(harness, [prompt]))[0]
    prefill, info = await harness.start_with_info(kv_cache_config__max_tokens=16 * BLOCK_SIZE)
    decode = await harness.start()
    request = request_of(prompt, OUTPUT)
    prefilled = await ask_prefill(prefill, request).result()
    before = bytes_of(prefill, prefilled.block_ids)
    stats = await stats_where(prefill, lambda stats: stats.pinned_blocks == 4)
    assert (stats.active_blocks, stats.num_running) == (4, 0)
    follower = Follower(prefill)
    await follower.next()
    others = [ask(prefill, prompt_of(1 + i, 30), 100) for i in range(6)]
    for other in others:
        assert len((await other.end()).tokens) == 100
    assert prefill.stats().preemptions > 0
    for index in range(8):
        await tokens_of(prefill, prompt_of(50 + index, 60), 1)
    await follower.until_stored(await store_marker(prefill, info, 0))
    assert set(hashes_of(info, prompt)) <= set(follower.replica.parents)
    await follower.close()
    assert bytes_of(prefill, prefilled.block_ids) == before
    reserved = await ask_reserve(decode, request).result()
    copy_kv(prefill, prefilled, decode, reserved)
    prefill.release(request.request_id)
    assert (await resume(decode, request, prefilled.first).end()).tokens == expected
    await holds_nothing(prefill)


async def test_released_blocks_are_prefix_cache(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=POOL)
    prompt = prompt_of(0, 50)
    request = request_of(prompt)
    await ask_prefill(engine, request).result()
    await holds(engine, {request.request_id: 4})
    # Also while they are pinned: sharing does not hurt the one who fetches them.
    assert (await ask(engine, prompt, 1).end()).cached_tokens == 48
    for _ in range(2):
        engine.release(request.request_id)
    await holds_nothing(engine)
    assert (await ask(engine, prompt, 1).end()).cached_tokens == 48


async def test_release_of_what_is_not_pinned_does_nothing(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=POOL)
    engine.release("never seen")
    running = ask(engine, prompt_of(0, 20), 60)
    await running.reaches(2)
    engine.release(running.request.request_id)
    reserved = ask_reserve(engine, request_of(prompt_of(1, 20)))
    await reserved.result()
    engine.release(reserved.request_id)
    assert (await engine.holdings())[reserved.request_id] == 2
    assert (await resume(engine, reserved.request, None).end()).finish_reason
    assert len((await running.end()).tokens) == 60
    prefilling = ask_prefill(engine, request_of(prompt_of(2, 20)))
    engine.release(prefilling.request_id)
    assert (await prefilling.result()).block_ids
    await holds(engine, {prefilling.request_id: 2})
    engine.release(prefilling.request_id)
    await holds_nothing(engine)


async def test_a_prefill_tells_how_long_it_waited_and_computed(harness: Harness) -> None:
    engine = await harness.start(max_num_tokens=33)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    prefilled = await ask_prefill(engine, request_of(prompt_of(0, 100))).result()
    took = loop.time() - begin
    assert prefilled.queue_s >= 0
    assert prefilled.compute_s > 0
    assert prefilled.queue_s + prefilled.compute_s <= took + 1e-3


# --- the decode side ---------------------------------------------------------------------------


async def test_reserve_waits_for_room_and_gets_its_turn(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=8 * BLOCK_SIZE)
    pinned = ask_prefill(engine, request_of(prompt_of(0, 7 * BLOCK_SIZE)))
    await pinned.result()
    reserved = ask_reserve(engine, request_of(prompt_of(1, 3 * BLOCK_SIZE)))
    behind = ask(engine, prompt_of(2, 5), 2)
    await stats_where(engine, lambda stats: stats.num_waiting == 2)
    await settled(engine)
    await holds(engine, {pinned.request_id: 7})
    assert not reserved.has_come
    assert not behind.chunks  # it would fit, but does not overtake
    engine.release(pinned.request_id)
    assert len((await reserved.result()).block_ids) == 3
    assert len((await behind.end()).tokens) == 2
    await holds(engine, {reserved.request_id: 3})
    assert (await resume(engine, reserved.request, None).end()).finish_reason is FinishReason.LENGTH
    await holds_nothing(engine)


async def test_reserved_streams_count_as_running_and_pinned_ones_do_not(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=1)
    pinned = [ask_prefill(engine, request_of(prompt_of(i, 20))) for i in range(3)]
    for one in pinned:
        await one.result()
    reserved = ask_reserve(engine, request_of(prompt_of(3, 20)))
    await reserved.result()
    waiting = ask(engine, prompt_of(4, 20), 2)
    stats = await stats_where(engine, lambda stats: stats.num_waiting == 1)
    assert (stats.num_running, stats.pinned_blocks, stats.reserved_blocks) == (1, 6, 2)
    steps = stats.num_steps
    await settled(engine)
    assert not waiting.chunks
    assert engine.stats().num_steps == steps  # an engine that only holds blocks takes no step
    engine.abort(reserved.request_id)
    assert len((await waiting.end()).tokens) == 2
    for one in pinned:
        engine.release(one.request_id)
    await holds_nothing(engine)


async def test_the_engine_does_not_touch_reserved_blocks(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=12 * BLOCK_SIZE)
    prompt = prompt_of(0, 50)
    await tokens_of(engine, prompt[: BLOCK_SIZE + 1], 1)
    reserved = ask_reserve(engine, request_of(prompt))
    found = await reserved.result()
    assert found.num_cached_blocks == 1
    for block in found.block_ids[1:]:
        pool_of(engine).block(block)[:] = bytes([block + 1]) * pool_of(engine).layout.block_bytes
    before = bytes_of(engine, found.block_ids)
    others = [ask(engine, prompt_of(1 + i, 20), 60) for i in range(4)]
    for other in others:
        assert len((await other.end()).tokens) == 60
    await tokens_of(engine, prompt_of(9, 100), 1)
    assert bytes_of(engine, found.block_ids) == before
    # What stands in them is nobody's prefix before it is said to be there.
    assert (await ask(engine, prompt, 1).end()).cached_tokens == BLOCK_SIZE
    assert bytes_of(engine, found.block_ids) == before
    engine.abort(reserved.request_id)
    await holds_nothing(engine)


async def test_received_blocks_become_prefix_cache_on_resume_and_not_before(
    harness: Harness,
) -> None:
    prefill = await harness.start(kv_cache_config__max_tokens=POOL)
    engine, info = await harness.start_with_info(kv_cache_config__max_tokens=POOL)
    prompt = prompt_of(0, 50)
    request = request_of(prompt, OUTPUT)
    follower = Follower(engine)
    await follower.next()
    prefilled = await ask_prefill(prefill, request).result()
    reserved = await ask_reserve(engine, request).result()
    copy_kv(prefill, prefilled, engine, reserved)
    await follower.until_stored(await store_marker(engine, info, 0))
    assert not set(hashes_of(info, prompt)) & set(follower.replica.parents)
    answer = resume(engine, request, prefilled.first)
    await answer.end()
    await follower.until_stored(hashes_of(info, prompt)[-1])
    await follower.close()
    again = await ask(engine, [*prompt, *answer.tokens[:1]], OUTPUT - 1).end()
    assert again.cached_tokens == 48
    assert again.tokens == answer.tokens[1:]
    assert answer.cached_tokens == 0
    await holds_nothing(engine)

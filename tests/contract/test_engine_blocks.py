"""The engine contract, part 4: pool, preemption, stats, prefix cache, KV events. On every engine."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract.engines import BLOCK_SIZE
from tests.contract.handoffs import stats_where
from tests.contract.harness import (
    Answer,
    Follower,
    Harness,
    ask,
    check_idle,
    check_sum,
    hashes_of,
    prompt_of,
    request_of,
    store_marker,
    tokens_of,
)
from trtllm_workers.types import FinishReason, KvEventKind, TokenChunk

# --- pool --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
async def test_an_oversubscribed_pool_finishes_every_request(harness: Harness, reuse: bool) -> None:
    engine = await harness.start(
        kv_cache_config__max_tokens=16 * BLOCK_SIZE, kv_cache_config__enable_block_reuse=reuse
    )
    answers = [ask(engine, prompt_of(i, 1 + 9 * (i % 12)), 50 + 3 * i) for i in range(24)]
    for index, answer in enumerate(answers):
        assert len((await answer.end()).tokens) == 50 + 3 * index
        check_sum(engine.stats())
    assert harness.kind.figures_lag or engine.stats().preemptions > 0
    assert engine.stats().finished == 24
    check_idle(engine)
    if not reuse:
        assert engine.stats().cached_blocks == 0


async def test_stats_count_what_happened(harness: Harness) -> None:
    engine, info = await harness.start_with_info(kv_cache_config__max_tokens=4096)
    fresh = engine.stats()
    check_idle(engine)
    assert (fresh.free_blocks, fresh.total_blocks) == (info.num_blocks, info.num_blocks)
    prompt = prompt_of(0, 40)
    await tokens_of(engine, prompt, 5)
    await tokens_of(engine, prompt, 7)
    stats = await stats_where(engine, lambda stats: stats.num_steps >= 12)
    assert stats.prompt_tokens == 80
    assert stats.cached_prompt_tokens == 2 * BLOCK_SIZE
    assert stats.output_tokens == 12
    assert stats.finished == 2
    assert (stats.preemptions, stats.aborts) == (0, 0)
    assert stats.cached_blocks == 2
    check_idle(engine)


async def test_stats_show_running_and_waiting_requests(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=2)
    answers = [ask(engine, prompt_of(i, 20), 100) for i in range(5)]
    stats = engine.stats()
    for length in range(2, 80):  # an engine may tell of a step a moment after its tokens
        await answers[0].reaches(length)
        stats = engine.stats()
        if (stats.num_running, stats.num_waiting) == (2, 3):
            break
    assert (stats.num_running, stats.num_waiting) == (2, 3)
    assert stats.active_blocks >= 4
    check_sum(stats)
    for answer in answers:
        await answer.end()
    check_idle(engine)


# --- prefix cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [15, 16, 17, 32, 33, 100])
async def test_cached_tokens_tells_whole_blocks_and_never_the_last_token(
    harness: Harness, length: int
) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4096)
    prompt = prompt_of(length, length)
    assert (await ask(engine, prompt).end()).cached_tokens == 0
    again = await ask(engine, prompt).end()
    assert again.cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert {chunk.cached_tokens for chunk in again.chunks} == {again.cached_tokens}


async def test_cached_tokens_counts_the_common_beginning_only(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4096)
    prompt = prompt_of(0, 80)
    await tokens_of(engine, prompt)
    other = [*prompt[:50], *prompt_of(1, 30)]
    assert (await ask(engine, other).end()).cached_tokens == 48
    shifted = [prompt[-1], *prompt[:-1]]
    assert (await ask(engine, shifted).end()).cached_tokens == 0


async def test_an_answer_is_cached_for_the_turn_that_follows_it(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4096)
    prompt = prompt_of(0, 20)
    tokens = await tokens_of(engine, prompt, 30)
    # 50 tokens; the last has no KV, so three blocks are full.
    following = [*prompt, *tokens, *prompt_of(1, 10)]
    assert (await ask(engine, following).end()).cached_tokens == 48


async def test_cache_salts_share_no_block(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4096)
    prompt = prompt_of(0, 50)
    await tokens_of(engine, prompt, cache_salt="a")
    assert (await ask(engine, prompt, cache_salt="b").end()).cached_tokens == 0
    assert (await ask(engine, prompt).end()).cached_tokens == 0
    assert (await ask(engine, prompt, cache_salt="a").end()).cached_tokens == 48


async def test_without_block_reuse_nothing_is_cached(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__enable_block_reuse=False)
    for _ in range(2):
        assert (await ask(engine, prompt_of(0, 50)).end()).cached_tokens == 0
    assert engine.stats().cached_blocks == 0


async def test_eviction_takes_the_least_recently_used_blocks(harness: Harness) -> None:
    engine, info = await harness.start_with_info(kv_cache_config__max_tokens=8 * BLOCK_SIZE)
    follower = Follower(engine)
    await follower.next()
    # Each takes three blocks while it runs and leaves two cached: six of eight after the first three.
    old, older, newer, newest = (prompt_of(i, 2 * BLOCK_SIZE + 1) for i in range(4))
    for prompt in (old, older, newer):
        await tokens_of(engine, prompt, 1)
    assert (await ask(engine, old, 1).end()).cached_tokens == 32  # now the most recently used
    await tokens_of(engine, newest, 1)
    await follower.until_stored(hashes_of(info, newest)[-1])
    removed = [
        digest
        for event in follower.events
        if event.kind is KvEventKind.REMOVED
        for digest in event.block_hashes
    ]
    assert removed
    assert set(removed) <= set(hashes_of(info, older))
    assert (await ask(engine, old, 1).end()).cached_tokens == 32
    assert (await ask(engine, older, 1).end()).cached_tokens < 32
    await follower.close()


async def test_eviction_never_takes_blocks_of_a_running_request(harness: Harness) -> None:
    engine, info = await harness.start_with_info(kv_cache_config__max_tokens=16 * BLOCK_SIZE)
    follower = Follower(engine)
    await follower.next()
    prompt = prompt_of(0, 50)
    long = ask(engine, prompt, 200)  # 16 blocks in the end, 6 of them during what follows
    await long.reaches(1)
    for index in range(8):  # 24 blocks in all
        await tokens_of(engine, prompt_of(1 + index, 60), 1)
    marker = await store_marker(engine, info, 0)
    assert long.finish_reason is None
    await follower.until_stored(marker)
    removed = {
        digest
        for event in follower.events
        if event.kind is KvEventKind.REMOVED
        for digest in event.block_hashes
    }
    assert removed
    assert not removed & set(hashes_of(info, [*prompt, *long.tokens]))
    assert len((await long.end()).tokens) == 200
    assert engine.stats().preemptions == 0
    await follower.close()


# --- KV events ---------------------------------------------------------------------------------


async def test_kv_events_name_the_blocks_of_a_prompt_in_a_chain(harness: Harness) -> None:
    engine, info = await harness.start_with_info()
    follower = Follower(engine)
    first = await follower.next()
    assert (first.kind, first.seq, first.block_hashes) == (KvEventKind.CLEARED, 0, ())
    prompt = prompt_of(0, 50)
    await tokens_of(engine, prompt, 1)
    hashes = hashes_of(info, prompt)
    await follower.until_stored(hashes[-1])
    assert follower.replica.parents == dict(zip(hashes, [None, *hashes], strict=False))
    assert follower.events[1].seq == 1
    salted = hashes_of(info, prompt, "salt")
    await tokens_of(engine, prompt, 1, cache_salt="salt")
    await follower.until_stored(salted[-1])
    await follower.close()


async def test_a_snapshot_bears_the_number_it_was_taken_at(harness: Harness) -> None:
    engine, info = await harness.start_with_info()
    early = Follower(engine)
    await early.next()
    await early.until_stored(await store_marker(engine, info, 0))
    late = Follower(engine)
    assert (await late.next()).seq == early.replica.seq
    await late.until_stored(await store_marker(engine, info, 1))
    await early.until_stored(await store_marker(engine, info, 2))
    await late.until_stored(next(reversed(early.replica.parents)))
    assert late.replica.parents == early.replica.parents
    assert late.replica.seq == early.replica.seq
    await early.close()
    await late.close()


async def test_a_subscription_that_ends_leaves_the_others_alone(harness: Harness) -> None:
    engine, info = await harness.start_with_info()
    gone, staying = Follower(engine), Follower(engine)
    await gone.next()
    await staying.next()
    reading = asyncio.create_task(gone.next())
    await tokens_of(engine, prompt_of(0, 5), 1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await gone.close()
    await staying.until_stored(await store_marker(engine, info, 0))
    await staying.close()


WORK = st.lists(
    st.tuples(
        st.integers(0, 5),  # which prompt
        st.integers(1, 120),  # its length
        st.integers(1, 60),  # max_tokens
        st.none() | st.integers(0, 30),  # abort after so many tokens
        st.booleans(),  # wait for the first token before the next request
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(work=WORK, max_num_tokens=st.sampled_from([33, 512]))
async def test_any_work_ends_well_and_events_replay_to_the_snapshot(
    harness: Harness, work: list[tuple[int, int, int, int | None, bool]], max_num_tokens: int
) -> None:
    engine, info = await harness.start_with_info(
        kv_cache_config__max_tokens=15 * BLOCK_SIZE, max_num_tokens=max_num_tokens
    )
    follower = Follower(engine)
    await follower.next()
    answers: list[tuple[Answer, int | None]] = []
    for which, length, max_tokens, abort_at, wait in work:
        request = request_of(prompt_of(which, 120)[:length], max_tokens)
        answer = Answer(request)

        def deliver(
            chunk: TokenChunk, answer: Answer = answer, abort_at: int | None = abort_at
        ) -> None:
            answer.deliver(chunk)
            check_sum(engine.stats())
            if abort_at is not None and len(answer.tokens) >= abort_at:
                engine.abort(answer.request.request_id)

        engine.submit(request, deliver)
        answers.append((answer, abort_at))
        if wait:
            await answer.reaches(1)
    for answer, abort_at in answers:
        await answer.end()
        if abort_at is None:
            assert answer.finish_reason is FinishReason.LENGTH
            assert len(answer.tokens) == answer.request.sampling.max_tokens
    check_idle(engine)
    marker = await store_marker(engine, info, 0)
    await follower.until_stored(marker)
    assert len(follower.replica.parents) == engine.stats().cached_blocks
    fresh = Follower(engine)
    await fresh.until_stored(marker)
    marker = await store_marker(engine, info, 1)
    await follower.until_stored(marker)
    await fresh.until_stored(marker)
    assert fresh.replica.parents == follower.replica.parents
    await follower.close()
    await fresh.close()
    harness.engines.remove(engine)
    await engine.close()

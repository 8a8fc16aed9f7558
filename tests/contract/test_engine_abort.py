"""The engine contract, part 2: abort, at every moment. Runs on every engine."""

from __future__ import annotations

import random
import time

import pytest

from tests.contract.engines import BLOCK_SIZE
from tests.contract.harness import (
    Answer,
    Harness,
    ask,
    check_idle,
    check_sum,
    prompt_of,
    request_of,
    tokens_of,
)
from trtllm_workers.types import FinishReason, TokenChunk


async def test_abort_ends_a_running_stream_within_a_step_and_frees_its_blocks(
    harness: Harness,
) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4096)
    mate = ask(engine, prompt_of(1, 10), 200)
    answer = ask(engine, prompt_of(0, 50), 200)
    await answer.reaches(5)
    num_tokens, mate_tokens = len(answer.tokens), len(mate.tokens)
    engine.abort(answer.request.request_id)
    await answer.end()
    assert answer.finish_reason is FinishReason.ABORT
    assert len(answer.tokens) <= num_tokens + 1
    # Two at most: the step in flight and one that a thread may have begun meanwhile.
    assert len(mate.tokens) <= mate_tokens + 2
    if not harness.kind.figures_lag:
        active = engine.stats().active_blocks
        assert active <= -(-(10 + len(mate.tokens) + 2) // BLOCK_SIZE)
    assert len((await mate.end()).tokens) == 200
    check_idle(engine)


async def test_abort_ends_a_waiting_stream(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=1)
    running = ask(engine, prompt_of(0, 10), 100)
    waiting = ask(engine, prompt_of(1, 10), 100)
    await running.reaches(2)
    engine.abort(waiting.request.request_id)
    await waiting.end()
    assert (waiting.finish_reason, waiting.tokens) == (FinishReason.ABORT, [])
    assert running.finish_reason is None
    assert len((await running.end()).tokens) == 100


async def test_abort_right_after_submit_ends_the_stream(harness: Harness) -> None:
    engine = await harness.start()
    answer = ask(engine, prompt_of(0, 100), 100)
    engine.abort(answer.request.request_id)
    await answer.end()
    assert answer.finish_reason is FinishReason.ABORT
    check_idle(engine)


async def test_abort_from_within_deliver_ends_that_stream_alone(harness: Harness) -> None:
    engine = await harness.start()
    answer = Answer(request_of(prompt_of(0, 20), 100))

    def deliver(chunk: TokenChunk) -> None:
        answer.deliver(chunk)
        if len(answer.tokens) == 3:
            engine.abort(answer.request.request_id)

    engine.submit(answer.request, deliver)
    mate = ask(engine, prompt_of(1, 20), 30)
    await answer.end()
    assert answer.finish_reason is FinishReason.ABORT
    assert len(answer.tokens) <= 4
    assert len((await mate.end()).tokens) == 30
    check_idle(engine)


async def test_abort_delivers_no_backlog_when_the_loop_was_late(harness: Harness) -> None:
    engine = await harness.start()
    answer = Answer(request_of(prompt_of(0, 20), 200))

    def deliver(chunk: TokenChunk) -> None:
        answer.deliver(chunk)
        if len(answer.tokens) == 3:
            # The loop is held up, and an engine with a thread may run ahead of it meanwhile.
            time.sleep(0.05)
            engine.abort(answer.request.request_id)

    engine.submit(answer.request, deliver)
    await answer.end()
    assert answer.finish_reason is FinishReason.ABORT
    assert len(answer.tokens) <= 4
    check_idle(engine)


async def test_abort_of_unknown_finished_and_aborted_requests_does_nothing(
    harness: Harness,
) -> None:
    engine = await harness.start()
    engine.abort("never seen")
    finished = await ask(engine, prompt_of(0, 10), 3).end()
    engine.abort(finished.request.request_id)
    aborted = ask(engine, prompt_of(1, 10), 100)
    await aborted.reaches(1)
    for _ in range(3):
        engine.abort(aborted.request.request_id)
    await aborted.end()
    engine.abort(aborted.request.request_id)
    await tokens_of(engine, prompt_of(2, 10), 10)
    assert finished.finish_reason is FinishReason.LENGTH
    assert not aborted.violations
    assert (engine.stats().aborts, engine.stats().finished) == (1, 2)
    check_idle(engine)


@pytest.mark.parametrize("pool_tokens", [4096, 16 * BLOCK_SIZE])
async def test_a_storm_of_aborts_leaves_no_active_block(harness: Harness, pool_tokens: int) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=pool_tokens, max_num_tokens=64)
    chance = random.Random(7)
    answers: list[Answer] = []
    for index in range(200):
        request = request_of(prompt_of(index % 20, chance.randint(1, 100)), chance.randint(1, 60))
        answer, abort_at = Answer(request), chance.randint(0, 20)

        def deliver(chunk: TokenChunk, answer: Answer = answer, abort_at: int = abort_at) -> None:
            answer.deliver(chunk)
            check_sum(engine.stats())
            if len(answer.tokens) == abort_at:
                engine.abort(answer.request.request_id)

        engine.submit(request, deliver)
        answers.append(answer)
        if abort_at == 0 or chance.random() < 0.2:
            engine.abort(request.request_id)
        elif chance.random() < 0.2:
            engine.abort(chance.choice(answers).request.request_id)
        if chance.random() < 0.3:
            await answers[chance.randrange(len(answers))].reaches(1)
    for answer in answers:
        await answer.end()
    check_idle(engine)
    stats = engine.stats()
    assert stats.aborts + stats.finished == 200
    assert stats.aborts == sum(a.finish_reason is FinishReason.ABORT for a in answers) > 100

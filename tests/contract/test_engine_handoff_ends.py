"""The engine contract, part 6: handoffs refused, aborted, closed over. Runs on every engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract.engines import BLOCK_SIZE, POOL_KINDS, VOCAB_SIZE, EngineKind
from tests.contract.handoffs import (
    Once,
    ask_prefill,
    ask_reserve,
    copy_kv,
    holds,
    holds_nothing,
    resume,
    settled,
    stats_where,
)
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
from trtllm_workers.errors import ContextTooLong, EngineDead, EngineError, RequestError
from trtllm_workers.types import FinishReason, Prefilled, Reservation, TokenChunk

# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture(params=POOL_KINDS, ids=[kind.name for kind in POOL_KINDS])
def engine_kind(request: pytest.FixtureRequest) -> EngineKind:
    """Each engine whose blocks are moved from outside."""
    kind: EngineKind = request.param
    return kind


@pytest.mark.parametrize("ask_for", [ask_prefill, ask_reserve])
@pytest.mark.parametrize(
    ("prompt", "max_tokens", "error", "param"),
    [
        ([], 5, RequestError, "prompt_token_ids"),
        ([VOCAB_SIZE], 5, RequestError, "prompt_token_ids"),
        ([5], 0, RequestError, "max_tokens"),
        ([5] * 100, 200, ContextTooLong, "max_tokens"),
    ],
)
async def test_prefill_and_reserve_check_like_submit(
    harness: Harness,
    ask_for: Any,
    prompt: list[int],
    max_tokens: int,
    error: type[RequestError],
    param: str,
) -> None:
    engine = await harness.start()
    with pytest.raises(error) as caught:
        ask_for(engine, request_of(prompt, max_tokens))
    assert caught.value.param == param
    await holds_nothing(engine)


async def test_a_request_longer_than_the_whole_pool_is_refused(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4 * BLOCK_SIZE)
    for ask_for in (ask_prefill, ask_reserve):
        with pytest.raises(ContextTooLong):
            ask_for(engine, request_of(prompt_of(0, 60), 5))
    await holds_nothing(engine)


async def test_an_id_in_use_is_refused_in_every_phase(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=2)
    pinned = ask_prefill(engine, request_of(prompt_of(0, 20)))
    await pinned.result()
    reserved = ask_reserve(engine, request_of(prompt_of(1, 20)))
    await reserved.result()
    running = ask(engine, prompt_of(2, 20), 200)
    await running.reaches(1)
    waiting = ask_reserve(engine, request_of(prompt_of(3, 20)))
    for request in (pinned.request, reserved.request, running.request, waiting.request):
        for begin in (engine.submit, engine.prefill, engine.reserve):
            refused: Once[Any] = Once(request)
            with pytest.raises(RequestError) as caught:
                begin(request, refused.deliver)
            assert caught.value.param == "request_id"
            assert not refused.has_come
    for request in (pinned.request, reserved.request, running.request, waiting.request):
        engine.abort(request.request_id)
    await running.end()
    assert (await waiting.result()).ended
    await holds_nothing(engine)
    # An id that is free again is as good as a new one.
    again = ask_prefill(engine, pinned.request)
    assert (await again.result()).block_ids
    engine.release(again.request_id)
    assert not (await ask_reserve(engine, pinned.request).result()).ended
    assert (await resume(engine, pinned.request, None).end()).finish_reason is FinishReason.LENGTH
    await holds_nothing(engine)


async def test_resume_of_what_is_not_reserved_raises(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=2)
    first = TokenChunk((7,))

    def refused(request_id: str) -> None:
        never: list[TokenChunk] = []
        for chunk in (first, None):
            with pytest.raises(EngineError, match=request_id):
                engine.resume(request_id, chunk, never.append)
        assert not never

    refused("never-seen")
    pinned = ask_prefill(engine, request_of(prompt_of(0, 20)))
    refused(pinned.request_id)
    await pinned.result()
    refused(pinned.request_id)
    engine.release(pinned.request_id)
    reserved = ask_reserve(engine, request_of(prompt_of(1, 20), 200))
    await reserved.result()
    answer = resume(engine, reserved.request, None)
    refused(reserved.request_id)
    running = ask(engine, prompt_of(2, 20), 200)
    await running.reaches(1)
    refused(running.request.request_id)
    waiting = ask_reserve(engine, request_of(prompt_of(3, 20)))
    refused(waiting.request_id)
    await answer.end()
    refused(reserved.request_id)
    await waiting.result()
    engine.abort(waiting.request_id)
    refused(waiting.request_id)
    await running.end()
    await holds_nothing(engine)


# --- who holds what ----------------------------------------------------------------------------


async def test_holdings_name_exactly_those_that_hold_blocks(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=2, kv_cache_config__max_tokens=4096)
    assert await engine.holdings() == {}
    prompt = prompt_of(0, 40)
    pinned = [ask_prefill(engine, request_of(prompt)) for _ in range(2)]
    for once in pinned:
        await once.result()
    reserved = ask_reserve(engine, request_of(prompt_of(1, 16)))
    await reserved.result()
    held = {pinned[0].request_id: 3, pinned[1].request_id: 3, reserved.request_id: 1}
    await holds(engine, held)
    running = ask(engine, prompt_of(2, 10), 200)
    waiting = ask_reserve(engine, request_of(prompt_of(3, 10)))
    ended = ask(engine, prompt_of(4, 10), 1)
    engine.abort(ended.request.request_id)
    await ended.end()
    await running.reaches(1)
    now = dict(await engine.holdings())
    assert running.finish_reason is None
    assert 1 <= now.pop(running.request.request_id) <= 14
    assert now == held
    for request_id in (*held, waiting.request_id, running.request.request_id):
        engine.abort(request_id)
    await running.end()
    await holds_nothing(engine)


# --- abort -------------------------------------------------------------------------------------


async def test_abort_of_a_prefill_that_waits_or_computes_tells_its_caller(
    harness: Harness,
) -> None:
    engine = await harness.start(max_batch_size=1, max_num_tokens=2)
    mate = ask(engine, prompt_of(0, 5), 100)
    await mate.reaches(1)
    waiting = ask_prefill(engine, request_of(prompt_of(1, 100)))
    engine.abort(waiting.request_id)
    ended = await waiting.result()
    assert ended.first.finish_reason is FinishReason.ABORT
    assert (ended.first.token_ids, ended.block_ids) == ((), ())
    assert mate.finish_reason is None
    await mate.end()
    computing = ask_prefill(engine, request_of(prompt_of(1, 200)))  # 100 steps
    await stats_where(engine, lambda stats: stats.active_blocks > 0)
    engine.abort(computing.request_id)
    ended = await computing.result()
    assert ended.first.finish_reason is FinishReason.ABORT
    assert (ended.first.token_ids, ended.block_ids) == ((), ())
    await holds_nothing(engine)


async def test_abort_right_after_prefill_and_reserve_ends_them(harness: Harness) -> None:
    engine = await harness.start()
    prefilling = ask_prefill(engine, request_of(prompt_of(0, 100)))
    reserving = ask_reserve(engine, request_of(prompt_of(1, 100)))
    for once in (prefilling, reserving):
        for _ in range(2):
            engine.abort(once.request_id)
    assert (await prefilling.result()).first.finish_reason is FinishReason.ABORT
    reserved = await reserving.result()
    assert reserved.ended is not None
    assert reserved.ended.finish_reason is FinishReason.ABORT
    assert reserved.block_ids == ()
    await holds_nothing(engine)


async def test_abort_of_a_pinned_or_reserved_request_frees_its_blocks_without_a_call(
    harness: Harness,
) -> None:
    engine = await harness.start()
    pinned = ask_prefill(engine, request_of(prompt_of(0, 50)))
    reserved = ask_reserve(engine, request_of(prompt_of(1, 50)))
    assert len((await pinned.result()).block_ids) == 4
    assert len((await reserved.result()).block_ids) == 4
    await holds(engine, {pinned.request_id: 4, reserved.request_id: 4})
    engine.abort(pinned.request_id)
    await holds(engine, {reserved.request_id: 4})
    engine.abort(reserved.request_id)
    await holds_nothing(engine)
    for _ in range(2):
        engine.abort(pinned.request_id)
        engine.release(pinned.request_id)
        engine.abort(reserved.request_id)
    await tokens_of(engine, prompt_of(2, 5))
    await pinned.result()  # still called once
    await reserved.result()
    await holds_nothing(engine)


async def test_abort_of_a_waiting_reservation_lets_those_behind_it_run(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=8 * BLOCK_SIZE)
    pinned = ask_prefill(engine, request_of(prompt_of(0, 6 * BLOCK_SIZE)))
    await pinned.result()
    reserving = ask_reserve(engine, request_of(prompt_of(1, 4 * BLOCK_SIZE)))
    behind = ask(engine, prompt_of(2, 5), 2)
    await stats_where(engine, lambda stats: stats.num_waiting == 2)
    await settled(engine)
    assert not behind.chunks
    engine.abort(reserving.request_id)
    ended = (await reserving.result()).ended
    assert ended is not None
    assert ended.finish_reason is FinishReason.ABORT
    assert len((await behind.end()).tokens) == 2
    await holds(engine, {pinned.request_id: 6})
    last = ask_reserve(engine, request_of(prompt_of(3, 4 * BLOCK_SIZE)))
    await settled(engine)
    assert not last.has_come
    engine.abort(pinned.request_id)
    assert len((await last.result()).block_ids) == 4
    engine.abort(last.request_id)
    await holds_nothing(engine)


@pytest.mark.parametrize("phase", ["prefill", "reserve"])
async def test_an_abort_of_one_by_the_other_s_deliver_is_told_or_comes_too_late(
    harness: Harness, phase: str
) -> None:
    engine = await harness.start()
    requests = [request_of(prompt_of(i, 20)) for i in range(2)]
    held: list[bool] = []

    def aborting(other: str) -> Callable[[Prefilled | Reservation], None]:
        def deliver(found: Prefilled | Reservation) -> None:
            held.append(bool(found.block_ids))
            engine.abort(other)

        return deliver

    begin = engine.prefill if phase == "prefill" else engine.reserve
    for request, other in zip(requests, reversed(requests), strict=True):
        begin(request, aborting(other.request_id))
    await tokens_of(engine, prompt_of(2, 20))
    await holds_nothing(engine)
    assert held == [True, False]


@pytest.mark.parametrize("brought", [True, False])
async def test_abort_of_a_resumed_request_ends_its_stream(harness: Harness, brought: bool) -> None:
    engine, source = await harness.start(), await harness.start()
    for reach in (0, 1, 4):
        request = request_of(prompt_of(reach, 50), 200)
        prefilled = await ask_prefill(source, request).result()
        reserved = await ask_reserve(engine, request).result()
        copy_kv(source, prefilled, engine, reserved)
        answer = resume(engine, request, prefilled.first if brought else None)
        if reach:
            await answer.reaches(reach)
        num_tokens = len(answer.tokens)
        engine.abort(request.request_id)
        await answer.end()
        assert answer.finish_reason is FinishReason.ABORT
        assert len(answer.tokens) <= num_tokens + 1
        source.release(request.request_id)
    await holds_nothing(engine)
    await holds_nothing(source)


async def test_callers_may_act_from_within_deliver(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=8 * BLOCK_SIZE)
    answer = Answer(request_of(prompt_of(0, 40), 12))
    pinned, dropped = request_of(prompt_of(1, 100)), request_of(prompt_of(2, 110))
    done: list[object] = []

    def on_reserved(result: Reservation) -> None:
        done.append(result)
        engine.resume(answer.request.request_id, None, answer.deliver)

    def on_pinned(result: Prefilled) -> None:
        done.append(result)
        engine.release(pinned.request_id)

    def on_dropped(result: Reservation) -> None:
        done.append(result)
        engine.abort(dropped.request_id)

    # The pool has eight blocks: each must wait for the one before it.
    engine.reserve(answer.request, on_reserved)
    engine.prefill(pinned, on_pinned)
    engine.reserve(dropped, on_dropped)
    last = await tokens_of(engine, prompt_of(3, 110), 2)
    assert (len((await answer.end()).tokens), len(last), len(done)) == (12, 2, 3)
    await holds_nothing(engine)


async def test_a_consumer_that_raises_loses_its_handoff_alone(harness: Harness) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, what: reported.append(what))
    engine = await harness.start()

    def broken(_result: object) -> None:
        raise RuntimeError("broken")

    engine.prefill(request_of(prompt_of(0, 40)), broken)
    engine.reserve(request_of(prompt_of(1, 40)), broken)
    mate = ask(engine, prompt_of(2, 40), 12)
    assert len((await mate.end()).tokens) == 12
    await holds_nothing(engine)
    assert [str(what["exception"]) for what in reported] == ["broken", "broken"]


# --- the end of the engine ---------------------------------------------------------------------


class EveryPhase:
    """One request in each phase of a handoff, in an engine whose pool and batch are full."""

    def __init__(self) -> None:
        self.held: list[Once[Any]] = []
        self.open_prefills: list[Once[Prefilled]] = []
        self.open_reservations: list[Once[Reservation]] = []
        self.streams: list[Answer] = []

    @classmethod
    async def arrange(cls, harness: Harness) -> tuple[Engine, EveryPhase]:
        engine = await harness.start(max_batch_size=3)
        all_of = cls()
        pinned = ask_prefill(engine, request_of(prompt_of(0, 40)))
        resumed = ask_reserve(engine, request_of(prompt_of(1, 40), 200))
        reserved = ask_reserve(engine, request_of(prompt_of(2, 40)))
        all_of.held = [pinned, resumed, reserved]
        for once in all_of.held:
            await once.result()
        all_of.streams = [
            resume(engine, resumed.request, None),
            ask(engine, prompt_of(3, 40), 200),
        ]
        for answer in all_of.streams:
            await answer.reaches(1)
        all_of.open_prefills = [ask_prefill(engine, request_of(prompt_of(4, 40)))]
        all_of.open_reservations = [ask_reserve(engine, request_of(prompt_of(5, 40)))]
        return engine, all_of

    async def check_ended(self, reason: FinishReason, code: str | None) -> None:
        """Fail unless every caller that waited was told once, and nobody else was called."""
        ends = [(await once.result()).first for once in self.open_prefills]
        for once in self.open_reservations:
            ended = (await once.result()).ended
            assert ended is not None
            ends.append(ended)
        ends += [(await answer.end()).last for answer in self.streams]
        assert {(end.finish_reason, end.error_code) for end in ends} == {(reason, code)}
        for once in self.held:
            await once.result()


def check_refuses(engine: Engine, request_id: str) -> None:
    """Fail unless an engine that ended takes no request and minds no leftover call."""
    never: list[object] = []
    for begin in (engine.submit, engine.prefill, engine.reserve):
        with pytest.raises(EngineDead):
            begin(request_of(prompt_of(0, 5)), never.append)
    with pytest.raises((EngineError, EngineDead)):
        engine.resume(request_id, None, never.append)
    engine.release(request_id)
    engine.abort(request_id)
    assert not never


async def test_close_ends_every_phase(harness: Harness) -> None:
    engine, all_of = await EveryPhase.arrange(harness)
    for _ in range(2):
        await engine.close()
    await all_of.check_ended(FinishReason.ABORT, None)
    for once in all_of.held:
        check_refuses(engine, once.request_id)
    assert await engine.holdings() == {}
    check_sum(engine.stats())


async def test_close_right_after_resume_delivers_nothing_after_the_end(harness: Harness) -> None:
    engine, source = await harness.start(), await harness.start()
    request = request_of(prompt_of(0, 40), 100)
    prefilled = await ask_prefill(source, request).result()
    reserved = await ask_reserve(engine, request).result()
    copy_kv(source, prefilled, engine, reserved)
    answer = resume(engine, request, prefilled.first)
    await engine.close()
    await settled(source)
    assert (await answer.end()).finish_reason is FinishReason.ABORT


async def test_death_ends_every_phase(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, all_of = await EveryPhase.arrange(harness)
    harness.kind.kill(monkeypatch, engine)
    async with asyncio.timeout(DEADLINE_S):
        assert isinstance(await engine.died(), EngineDead)
    await all_of.check_ended(FinishReason.ERROR, EngineDead.code)
    for once in all_of.held:
        check_refuses(engine, once.request_id)
    assert await engine.holdings() == {}


async def test_close_with_nothing_but_held_blocks(harness: Harness) -> None:
    engine = await harness.start()
    pinned = ask_prefill(engine, request_of(prompt_of(0, 40)))
    reserved = ask_reserve(engine, request_of(prompt_of(1, 40)))
    await pinned.result()
    await reserved.result()
    await holds(engine, {pinned.request_id: 3, reserved.request_id: 3})
    await engine.close()
    await pinned.result()
    await reserved.result()
    check_refuses(engine, reserved.request_id)

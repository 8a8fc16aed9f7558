"""Traces through workers that are modelled: mode kv uses their caches, and loses nothing without them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from benchmarks.simulated_workers import Costs, Outcome, simulate
from benchmarks.traces import TraceRequest, chats, strangers
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.router import Router

# Four workers that can hold about a quarter of the trace's chats each.
SMALL = Costs(num_blocks=700)


def outcome(
    trace: Sequence[TraceRequest], mode: RouterMode, costs: Costs, *, uses_events: bool = True
) -> Outcome:
    return simulate(
        trace,
        lambda now, rng: Router(mode, uses_events=uses_events, now=now, rng=rng),
        costs=costs,
    )


@pytest.mark.parametrize("uses_events", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_chats_hit_the_cache_half_as_often_again_and_begin_sooner(
    seed: int, uses_events: bool
) -> None:
    trace = chats(seed=seed, num_chats=60, turns=8, system_tokens=256, chats_per_s=2.5)
    even = outcome(trace, RouterMode.ROUND_ROBIN, SMALL)
    kv = outcome(trace, RouterMode.KV, SMALL, uses_events=uses_events)
    assert kv.hit_rate >= 1.5 * even.hit_rate
    assert kv.ttft_s(90) < 0.7 * even.ttft_s(90)


@pytest.mark.parametrize("per_s", [10.0, 30.0])
def test_prompts_without_shared_prefixes_do_not_wait_longer_than_with_least_loaded(
    per_s: float,
) -> None:
    trace = strangers(seed=3, count=500, requests_per_s=per_s)
    least, kv = (
        outcome(trace, mode, Costs(num_blocks=8000))
        for mode in (RouterMode.LEAST_LOADED, RouterMode.KV)
    )
    assert kv.hit_rate == 0
    for percent in (50, 90):
        assert kv.ttft_s(percent) <= 1.05 * least.ttft_s(percent)


def test_one_system_prompt_for_all_does_not_empty_the_other_workers() -> None:
    trace = chats(
        seed=4, num_chats=300, turns=1, system_tokens=4096, user_tokens=32, chats_per_s=40
    )
    kv = outcome(trace, RouterMode.KV, Costs())
    assert kv.hit_rate > 0.9
    assert min(kv.requests_by_worker.values()) >= len(trace) / 8
    assert len(kv.requests_by_worker) == 4


def test_traces_are_the_same_for_the_same_seed_and_others_for_others() -> None:
    assert chats(seed=1, num_chats=3) == chats(seed=1, num_chats=3)
    assert chats(seed=1, num_chats=3) != chats(seed=2, num_chats=3)
    assert strangers(seed=1, count=5) == strangers(seed=1, count=5)
    assert strangers(seed=1, count=5) != strangers(seed=2, count=5)


def test_each_turn_of_a_chat_goes_on_where_the_last_one_ended() -> None:
    trace = chats(seed=6, num_chats=5, turns=4, system_tokens=50)
    assert len({request.request_id for request in trace}) == 20
    assert [one.at_s for one in trace] == sorted(one.at_s for one in trace)
    by_chat = {
        chat: [one for one in trace if one.chat == chat] for chat in {one.chat for one in trace}
    }
    system = trace[0].prompt_token_ids[:50]
    for turns in by_chat.values():
        assert [one.turn for one in turns] == [0, 1, 2, 3]
        assert turns[0].prompt_token_ids[:50] == system
        for before, after in itertools.pairwise(turns):
            history = before.prompt_token_ids
            assert after.prompt_token_ids[: len(history)] == history
            assert len(after.prompt_token_ids) > len(history) + before.output_tokens
            assert after.at_s - before.at_s == pytest.approx(after.pause_s)


def test_strangers_share_no_first_block() -> None:
    trace = strangers(seed=1, count=200, prompt_tokens=40)
    assert len({one.prompt_token_ids[:8] for one in trace}) == 200

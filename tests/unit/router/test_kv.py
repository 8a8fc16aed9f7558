"""Mode kv: what a request costs where, the cap on affinity, temperature, and the reasons it gives."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from tests.unit.router.support import (
    BLOCK,
    address,
    fill,
    hashes,
    open_pool,
    place,
    record,
    send,
    send_to,
    stored,
    told,
)
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.pool import Pool, Query
from trtllm_workers.router.router import Router
from trtllm_workers.router.weights import Weights

PROMPT = list(range(100, 100 + 20 * BLOCK))
OTHER = list(range(500, 500 + 20 * BLOCK))


def hold(pool: Pool, worker_id: str, tokens: list[int], seq: int = 1) -> None:
    assert pool.apply(address(worker_id), [stored(seq, hashes(tokens))])


def test_the_worker_that_holds_most_of_the_prompt_is_chosen() -> None:
    pool = open_pool()
    hold(pool, "w1", PROMPT[: 10 * BLOCK])
    hold(pool, "w2", PROMPT[: 5 * BLOCK])
    choice = place(pool, PROMPT)
    assert choice.mode is RouterMode.KV
    assert (choice.worker_id, choice.overlap_tokens) == ("w1", 10 * BLOCK)
    assert choice.prompt_tokens == len(PROMPT)
    assert choice.reason == "lowest cost"
    assert choice.cost == pytest.approx(0.5)


def test_one_token_is_always_computed() -> None:
    pool = open_pool()
    hold(pool, "w1", PROMPT)
    choice = place(pool, PROMPT)
    assert choice.overlap_tokens == len(PROMPT) - 1
    assert choice.rows[0].uncached_tokens == 1


@pytest.mark.parametrize("num_tokens", [0, 1, BLOCK - 1])
def test_a_prompt_without_a_full_block_is_placed_by_load(num_tokens: int) -> None:
    pool = open_pool(num_workers=2)
    send_to(pool, "w0", OTHER)
    choice = place(pool, PROMPT[:num_tokens])
    assert (choice.worker_id, choice.overlap_tokens) == ("w1", 0)


def test_equal_workers_take_turns() -> None:
    pool = open_pool(num_workers=4)
    found = Counter(place(pool, [index, *PROMPT]).worker_id for index in range(20))
    assert set(found.values()) == {5}
    for worker_id in ("w1", "w3"):
        hold(pool, worker_id, PROMPT)
    found = Counter(place(pool, PROMPT).worker_id for _ in range(20))
    assert found == {"w1": 10, "w3": 10}


def test_prompts_that_wait_before_it_outweigh_a_small_overlap() -> None:
    pool = open_pool(num_workers=2, weights=Weights(load=0.0))
    hold(pool, "w0", PROMPT[: 2 * BLOCK])
    charge = send_to(pool, "w0", OTHER)
    choice = place(pool, PROMPT)
    assert choice.worker_id == "w1"
    assert (
        choice.reason
        == f"lowest cost; {2 * BLOCK} tokens are cached at a worker with too much to do"
    )
    charge.computed()
    assert place(pool, PROMPT).worker_id == "w0"


def test_prompts_of_others_that_wait_count_as_long_as_this_one() -> None:
    pool = open_pool(num_workers=2, weights=Weights(load=0.0))
    pool.told(address("w0"), told(running=1, waiting=2))
    choice = place(pool, PROMPT)
    assert choice.worker_id == "w1"
    assert choice.rows[1].waiting_tokens == 2 * len(PROMPT)


def test_the_load_weight_decides_between_cache_and_idleness() -> None:
    for load, worker_id in ((0.1, "w0"), (10.0, "w1")):
        pool = open_pool(num_workers=2, weights=Weights(load=load))
        hold(pool, "w0", PROMPT)
        pool.told(address("w0"), told(running=2))
        assert place(pool, PROMPT).worker_id == worker_id


def test_a_worker_without_blocks_for_the_prompt_costs_more() -> None:
    pool = open_pool(num_workers=2)
    pool.told(address("w0"), told(available=5))
    choice = place(pool, PROMPT)
    assert choice.worker_id == "w1"
    assert choice.rows[1].free_blocks == 5
    assert choice.rows[1].free_cost == pytest.approx(15 / 20)
    pool = open_pool(num_workers=2, weights=Weights(free=0.0))
    pool.told(address("w0"), told(available=5))
    assert {place(pool, PROMPT).worker_id for _ in range(2)} == {"w0", "w1"}


def test_blocks_of_prompts_on_their_way_are_not_available_any_more() -> None:
    pool = open_pool(num_workers=1, num_blocks=30)
    charge = send_to(pool, "w0", OTHER)
    assert place(pool, PROMPT).rows[0].free_blocks == 10
    charge.ended()
    pool.told(address("w0"), told(available=30))
    assert place(pool, PROMPT).rows[0].free_blocks == 30


def test_rows_are_the_chosen_and_the_next_best_with_the_parts_of_their_cost() -> None:
    pool = open_pool(num_workers=7)
    for index in range(7):
        hold(pool, f"w{index}", PROMPT[: index * BLOCK])
    pool.told(address("w6"), told(running=1, waiting=1))
    choice = place(pool, PROMPT)
    assert [row.worker_id for row in choice.rows] == ["w5", "w4", "w3", "w2", "w1"]
    costs = [row.cost for row in choice.rows]
    assert costs == sorted(costs)
    for row in choice.rows:
        assert row.cost == pytest.approx(row.overlap_cost + row.load_cost + row.free_cost)
        assert row.overlap_tokens + row.uncached_tokens == len(PROMPT)
        assert not row.capped
    assert len(place(open_pool(num_workers=2), PROMPT).rows) == 2


def test_every_number_of_a_row_is_finite() -> None:
    pool = open_pool(num_workers=3)
    choice = pool.place(Query(PROMPT), allowed=frozenset([address("w1")]))
    assert choice is not None
    assert [row.worker_id for row in choice.rows] == ["w1"]
    assert all(math.isfinite(cost) for cost in (choice.cost, choice.rows[0].cost))


def test_one_shared_prompt_does_not_pull_all_requests_to_one_worker() -> None:
    pool = open_pool(num_workers=4, weights=Weights(load=0.0, overlap=1.0))
    hold(pool, "w0", PROMPT)
    found = Counter[str]()
    capped = None
    for _ in range(100):
        choice, charge = send(pool, PROMPT)
        charge.computed()  # nothing waits: only the cap can spread them
        found[choice.worker_id] += 1
        if choice.worker_id != "w0" and capped is None:
            capped = choice
    assert capped is not None
    assert capped.reason == (
        f"lowest cost; {len(PROMPT) - 1} tokens are cached at a worker over the affinity cap"
    )
    assert found["w0"] <= 60
    assert sum(found.values()) == 100


def test_without_a_cap_affinity_may_pull_everything() -> None:
    pool = open_pool(num_workers=4, weights=Weights(load=0.0, affinity_cap=0.0))
    hold(pool, "w0", PROMPT)
    for _ in range(50):
        choice, charge = send(pool, PROMPT)
        charge.computed()
        assert choice.worker_id == "w0"


def test_a_capped_worker_is_shown_as_such() -> None:
    pool = open_pool(num_workers=3, weights=Weights(affinity_cap=1.0))
    hold(pool, "w0", PROMPT)
    pool.told(address("w0"), told(running=30))
    rows = {row.worker_id: row for row in place(pool, PROMPT).rows}
    assert (rows["w0"].capped, rows["w0"].overlap_tokens) == (True, 0)
    assert not rows["w1"].capped


def test_few_requests_are_no_pile() -> None:
    pool = open_pool(num_workers=4, weights=Weights(load=0.0, affinity_cap=1.0))
    hold(pool, "w0", PROMPT)
    for _ in range(4):
        choice, charge = send(pool, PROMPT)
        charge.computed()
        assert choice.worker_id == "w0"


def test_a_temperature_spreads_requests_and_cheaper_workers_stay_likelier() -> None:
    pool = open_pool(num_workers=3, weights=Weights(temperature=0.5))
    hold(pool, "w1", PROMPT)
    found = Counter(place(pool, PROMPT).worker_id for _ in range(3000))
    # Costs are 1/80, 1 and 1: odds of 1 to exp(-2 × 79/80) each.
    odds = math.exp(-2 * (1 - 1 / len(PROMPT)))
    assert found["w1"] / 3000 == pytest.approx(1 / (1 + 2 * odds), abs=0.03)
    assert found["w0"] / 3000 == pytest.approx(odds / (1 + 2 * odds), abs=0.03)
    assert place(pool, PROMPT).reason.startswith("drawn by cost")


def test_a_temperature_never_draws_a_worker_that_may_not_take_the_request() -> None:
    pool = open_pool(num_workers=5, weights=Weights(temperature=100.0))
    allowed = frozenset([address("w2"), address("w4")])
    drawn = [pool.place(Query(PROMPT), allowed=allowed) for _ in range(500)]
    assert {one.worker_id for one in drawn if one is not None} == {"w2", "w4"}


def test_a_draw_of_zero_is_no_exception() -> None:
    class Zero(random.Random):
        def random(self) -> float:
            return 0.0

    pool = Router(RouterMode.KV, Weights(temperature=1.0), rng=Zero()).pool("pool")
    fill(pool, [record("w0"), record("w1")])
    choice = pool.place(Query(PROMPT), allowed=frozenset([address("w1")]))
    assert choice is not None
    assert choice.worker_id == "w1"


def test_load_is_what_a_worker_has_more_than_the_idlest() -> None:
    pool = open_pool(num_workers=2)
    for worker_id, running in (("w0", 3), ("w1", 5)):
        pool.told(address(worker_id), told(running=running))
    rows = {row.worker_id: row for row in place(pool, PROMPT).rows}
    assert rows["w0"].load_cost == 0
    assert rows["w1"].load_cost == pytest.approx(2 / (2 + 2 * 4))


def test_the_cache_of_an_excluded_worker_is_no_reason() -> None:
    pool = open_pool(num_workers=3)
    hold(pool, "w1", PROMPT)
    choice = pool.place(Query(PROMPT), exclude=address("w1"))
    assert choice is not None
    assert choice.reason == "lowest cost"


def test_pools_of_a_router_know_nothing_of_each_other() -> None:
    router = Router(RouterMode.KV)
    one, two = router.pool(("m", "makers")), router.pool(("m", "prefills"))
    assert router.pool(("m", "makers")) is one
    fill(one, [record("w0"), record("w1")])
    fill(two, [record("w0"), record("w1")])
    hold(one, "w0", PROMPT)
    hold(two, "w1", PROMPT)
    query = Query(PROMPT)
    first, second = one.place(query), two.place(query)
    assert first is not None
    assert second is not None
    assert (first.worker_id, second.worker_id) == ("w0", "w1")
    one.charge(first, query)
    assert two.loads.ours[0] == 0
    router.drop(("m", "makers"))
    assert router.pool(("m", "makers")) is not one


def test_salts_and_adapters_do_not_share_caches() -> None:
    pool = open_pool()
    assert pool.apply(address("w1"), [stored(1, hashes(PROMPT, salt="a", lora="x"))])
    for salt, lora, tokens in (
        ("a", "x", len(PROMPT) - 1),
        ("a", "", 0),
        ("", "x", 0),
        ("", "", 0),
    ):
        choice = pool.place(
            Query(PROMPT, cache_salt=salt, lora=lora), allowed=frozenset([address("w1")])
        )
        assert choice is not None
        assert choice.overlap_tokens == tokens

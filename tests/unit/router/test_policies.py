"""Each router mode gives requests to the workers it says it does."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

from tests.unit.router.support import (
    BLOCK,
    address,
    fill,
    open_pool,
    place,
    record,
    send,
    send_to,
    told,
)
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.pool import Pool, Query
from trtllm_workers.types import Address

PROMPT = list(range(10 * BLOCK))


def counts(pool: Pool, num: int, allowed: frozenset[str] | None = None) -> Counter[str]:
    among = None if allowed is None else frozenset(address(one) for one in allowed)
    found = [pool.place(Query(PROMPT), allowed=among) for _ in range(num)]
    return Counter(choice.worker_id for choice in found if choice is not None)


@pytest.mark.parametrize("mode", RouterMode)
def test_no_worker_takes_a_request_unless_it_is_open(mode: RouterMode) -> None:
    pool = open_pool(mode, num_workers=0)
    assert pool.place(Query(PROMPT)) is None
    pool.update([record("w0"), record("w1")])
    assert pool.place(Query(PROMPT)) is None
    pool.set_open(address("w1"), True)
    assert place(pool, PROMPT).address == address("w1")
    pool.set_open(address("w1"), False)
    assert pool.place(Query(PROMPT)) is None
    pool.set_open(address("w1"), True)
    pool.update([record("w0")])
    assert pool.place(Query(PROMPT)) is None


@pytest.mark.parametrize("mode", RouterMode)
def test_only_allowed_workers_are_chosen_and_never_the_excluded_one(mode: RouterMode) -> None:
    pool = open_pool(mode, num_workers=5)
    allowed = [address("w1"), address("w3"), address("not here")]
    assert _placed(pool, allowed, None) == {"w1", "w3"}
    assert _placed(pool, allowed, "w3") == {"w1"}
    assert _placed(pool, None, "w3") == {"w0", "w1", "w2", "w4"}
    assert pool.place(Query(PROMPT), allowed=[address("w3")], exclude=address("w3")) is None
    assert pool.place(Query(PROMPT), allowed=[]) is None
    pool.set_open(address("w1"), False)
    assert _placed(pool, allowed, None) == {"w3"}


def _placed(pool: Pool, allowed: list[Address] | None, exclude: str | None) -> set[str]:
    not_this = None if exclude is None else address(exclude)
    found = [pool.place(Query(PROMPT), allowed=allowed, exclude=not_this) for _ in range(60)]
    return {choice.worker_id for choice in found if choice is not None}


@pytest.mark.parametrize("mode", RouterMode)
def test_more_workers_than_were_foreseen_all_get_requests(mode: RouterMode) -> None:
    pool = open_pool(mode, num_workers=8)
    _, early = send(pool, PROMPT)
    fill(pool, [record(f"w{index}") for index in range(40)])
    early.ended()
    chosen = {send(pool, [index, *PROMPT])[0].worker_id for index in range(400)}
    assert chosen == {f"w{index}" for index in range(40)}


def test_random_draws_from_all_and_tells_so() -> None:
    pool = open_pool(RouterMode.RANDOM, num_workers=4)
    found = counts(pool, 2000)
    assert all(400 < found[f"w{index}"] < 600 for index in range(4))
    assert place(pool, PROMPT).reason == "drawn from 4"


def test_random_is_the_same_with_the_same_generator() -> None:
    first, second = (open_pool(RouterMode.RANDOM, seed=7) for _ in range(2))
    assert [place(first, PROMPT).worker_id for _ in range(20)] == [
        place(second, PROMPT).worker_id for _ in range(20)
    ]


def test_round_robin_gives_equal_turns() -> None:
    pool = open_pool(RouterMode.ROUND_ROBIN, num_workers=4)
    in_turn = [place(pool, PROMPT).worker_id for _ in range(12)]
    assert in_turn == ["w0", "w1", "w2", "w3"] * 3


def test_round_robin_gives_equal_turns_to_two_kinds_of_requests_that_alternate() -> None:
    pool = open_pool(RouterMode.ROUND_ROBIN, num_workers=4)
    found: Counter[str] = Counter()
    for _ in range(10):
        found += counts(pool, 1, frozenset({"w0", "w1"}))
        found += counts(pool, 1, frozenset({"w2", "w3"}))
    assert set(found.values()) == {5}


def test_round_robin_goes_on_when_workers_come_and_go() -> None:
    pool = open_pool(RouterMode.ROUND_ROBIN, num_workers=3)
    counts(pool, 3)
    pool.set_open(address("w1"), False)
    assert counts(pool, 4) == {"w0": 2, "w2": 2}
    fill(pool, [record(f"w{index}") for index in range(4)])
    assert counts(pool, 8) == {"w0": 2, "w1": 2, "w2": 2, "w3": 2}


def test_least_loaded_takes_the_fewest_requests_and_equal_ones_take_turns() -> None:
    pool = open_pool(RouterMode.LEAST_LOADED, num_workers=3)
    assert counts(pool, 6) == {"w0": 2, "w1": 2, "w2": 2}
    charges = [send(pool, PROMPT)[1] for _ in range(6)]
    send_to(pool, "w0", PROMPT)
    send_to(pool, "w1", PROMPT)
    choice, charge = send(pool, PROMPT)
    assert (choice.worker_id, choice.reason) == ("w2", "fewest requests (2)")
    for one in [*charges, charge]:
        one.ended()
    assert counts(pool, 5) == {"w2": 5}


def test_least_loaded_believes_workers_that_tell_of_others_requests() -> None:
    pool = open_pool(RouterMode.LEAST_LOADED, num_workers=2)
    pool.told(address("w0"), told(running=2, waiting=1))
    assert counts(pool, 3) == {"w1": 3}
    for _ in range(3):
        send_to(pool, "w1", PROMPT)
    assert counts(pool, 4) == {"w0": 2, "w1": 2}


def test_a_worker_that_has_not_heard_of_our_requests_does_not_look_idle() -> None:
    pool = open_pool(RouterMode.LEAST_LOADED, num_workers=2)
    send_to(pool, "w0", PROMPT)
    pool.told(address("w0"), told())
    assert counts(pool, 3) == {"w1": 3}


def test_our_own_requests_are_not_counted_twice_once_a_worker_tells_of_them() -> None:
    pool = open_pool(RouterMode.LEAST_LOADED, num_workers=2)
    charge = send_to(pool, "w0", PROMPT)
    pool.told(address("w0"), told(running=1))
    send_to(pool, "w1", PROMPT)
    assert counts(pool, 4) == {"w0": 2, "w1": 2}
    charge.ended()
    assert counts(pool, 4) == {"w0": 4}


@pytest.mark.parametrize("mode", RouterMode)
def test_a_charge_may_end_twice_and_in_any_order(mode: RouterMode) -> None:
    pool = open_pool(mode, num_workers=2)
    for calls in (("computed", "computed", "ended", "ended"), ("ended", "computed", "ended")):
        charge = send_to(pool, "w0", PROMPT)
        for call in calls:
            getattr(charge, call)()
    send_to(pool, "w0", [5])
    assert {place(pool, [7]).worker_id for _ in range(2)} == {"w1"} or mode in (
        RouterMode.RANDOM,
        RouterMode.ROUND_ROBIN,
    )
    assert pool.loads.ours[0] == 1
    assert pool.loads.waiting[0] == 1


@pytest.mark.parametrize("mode", RouterMode)
def test_charges_of_a_worker_that_left_do_not_count_for_who_has_its_place(mode: RouterMode) -> None:
    pool = open_pool(mode, num_workers=1)
    charge = send_to(pool, "w0", PROMPT)
    choice = place(pool, PROMPT)
    pool.update([])
    late = pool.charge(choice, Query(PROMPT))
    fill(pool, [record("w0")])  # the same incarnation, seen again
    send_to(pool, "w0", [1, 2, 3])
    for one in (charge, late):
        one.computed()
        one.ended()
    assert pool.loads.ours[0] == 1
    assert pool.loads.waiting[0] == 3


def test_only_mode_kv_loads_numpy() -> None:
    code = (
        "import sys; from trtllm_workers.router.router import Router; "
        "from trtllm_workers.router.policies import RouterMode; "
        "[Router(mode).pool(1) for mode in RouterMode if mode != 'kv']; "
        "before = 'numpy' in sys.modules; Router(RouterMode.KV).pool(1); "
        "print(before, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.split() == ["False", "True"]

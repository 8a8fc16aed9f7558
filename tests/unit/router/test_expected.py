"""What was sent counts as held until a worker tells, and, where none tells, for a while."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.router.support import (
    BLOCK,
    Clock,
    address,
    hashes,
    open_pool,
    overlap,
    place,
    removed,
    send,
    send_to,
    stored,
)
from trtllm_workers.router.expected import GRACE_S, Expectation, Expected
from trtllm_workers.router.weights import Weights

PROMPT = list(range(10 * BLOCK))
CHAT = [*PROMPT, *range(900, 900 + 4 * BLOCK)]
W0 = address("w0")


def test_the_next_request_of_a_chat_follows_before_any_event() -> None:
    pool = open_pool(num_workers=4)
    first, charge = send(pool, PROMPT)
    charge.computed()
    choice = place(pool, CHAT)
    assert (choice.worker_id, choice.overlap_tokens) == (first.worker_id, len(PROMPT))


def test_an_event_settles_what_was_expected_and_its_removal_counts() -> None:
    pool = open_pool()
    send_to(pool, "w0", PROMPT)
    assert pool.apply(W0, [stored(1, hashes(PROMPT)[:6])])
    assert overlap(pool, "w0", PROMPT) == len(PROMPT) - 1
    assert pool.apply(W0, [removed(2, hashes(PROMPT)[2:3])])
    assert overlap(pool, "w0", PROMPT) == 2 * BLOCK


def test_what_is_not_confirmed_is_given_up_a_moment_after_the_end() -> None:
    clock = Clock()
    pool = open_pool(clock=clock)
    charge = send_to(pool, "w0", PROMPT)
    clock.now_s += 600  # it waits long
    assert overlap(pool, "w0", PROMPT) == len(PROMPT) - 1
    charge.computed()
    charge.ended()
    clock.now_s += GRACE_S - 0.1
    assert overlap(pool, "w0", PROMPT) == len(PROMPT) - 1
    clock.now_s += 0.2
    assert overlap(pool, "w0", PROMPT) == 0


def test_a_prompt_that_was_never_computed_is_given_up_at_once() -> None:
    for uses_events in (True, False):
        pool = open_pool(uses_events=uses_events)
        send_to(pool, "w0", PROMPT).ended()
        assert overlap(pool, "w0", PROMPT) == 0


def test_blocks_that_another_request_expects_too_stay_when_the_first_ends() -> None:
    clock = Clock()
    pool = open_pool(clock=clock)
    first, _second = send_to(pool, "w0", PROMPT), send_to(pool, "w0", CHAT)
    first.ended()
    assert overlap(pool, "w0", CHAT) == len(CHAT) - 1
    third = send_to(pool, "w0", PROMPT)
    third.computed()
    third.ended()
    fourth = send_to(pool, "w0", PROMPT)
    clock.now_s += 2 * GRACE_S
    assert overlap(pool, "w0", PROMPT) == len(PROMPT) - 1
    fourth.ended()
    assert overlap(pool, "w0", PROMPT) == 0


def test_expectations_of_one_worker_say_nothing_of_another() -> None:
    pool = open_pool()
    send_to(pool, "w0", PROMPT)
    assert overlap(pool, "w1", PROMPT) == 0


def test_without_events_a_prompt_counts_until_it_was_not_used_for_so_long() -> None:
    clock = Clock()
    pool = open_pool(uses_events=False, clock=clock, weights=Weights(ttl_s=100.0))
    charge = send_to(pool, "w0", PROMPT)
    charge.computed()
    charge.ended()
    clock.now_s += 60
    send_to(pool, "w0", CHAT)
    clock.now_s += 60
    assert overlap(pool, "w0", PROMPT) == len(PROMPT) - 1, "it was used again"
    clock.now_s += 60
    assert overlap(pool, "w0", PROMPT) == 0


def test_without_events_a_worker_is_not_believed_to_hold_more_than_it_can() -> None:
    pool = open_pool(uses_events=False, num_blocks=12)
    send_to(pool, "w0", PROMPT)
    other = [7, *PROMPT]
    send_to(pool, "w0", other[: 5 * BLOCK])
    assert overlap(pool, "w0", other[: 5 * BLOCK]) == 5 * BLOCK - 1
    assert overlap(pool, "w0", PROMPT) == 7 * BLOCK, "the last blocks of the older prompt went"


def test_without_events_a_prompt_that_was_used_again_stays_longest() -> None:
    pool = open_pool(uses_events=False, num_blocks=20)
    old, young = PROMPT, [7, *PROMPT][: 10 * BLOCK]
    for tokens in (old, young, old, [8, *PROMPT][: 10 * BLOCK]):
        send_to(pool, "w0", tokens)
    assert overlap(pool, "w0", old) == len(old) - 1
    assert overlap(pool, "w0", young) == 0


BLOCKS = [bytes([number]) * 16 for number in range(8)]
SOME = st.lists(st.sampled_from(BLOCKS), max_size=8, unique=True)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("expect"), st.sampled_from([0, 1]), SOME),
            st.tuples(st.just("settle"), st.sampled_from([0, 1]), SOME),
            st.tuples(st.just("drop"), st.integers(0, 30), SOME),
            st.tuples(st.just("wait"), st.integers(1, 30), SOME),
        ),
        max_size=30,
    )
)
def test_expected_blocks_equal_a_naive_model(deeds: list[tuple[str, int, list[bytes]]]) -> None:
    ttl_s, limit = 50.0, 5
    expected, now_s = Expected(ttl_s), 0.0
    made: list[Expectation] = []
    model: dict[int, dict[bytes, tuple[float, int]]] = {0: {}, 1: {}}  # in order of use
    for deed, number, blocks in deeds:
        if deed == "expect":
            held = model[number]
            for block in reversed(blocks):
                held.pop(block, None)
                held[block] = (now_s + ttl_s, len(made))
            while len(held) > limit:
                del held[next(iter(held))]
            made.append(expected.expect(number, blocks, now_s, limit))
        elif deed == "settle":
            for block in blocks:
                model[number].pop(block, None)
            expected.settle(number, blocks)
        elif deed == "drop" and number < len(made):
            held = model[made[number].slot]
            for block in [block for block, (_, maker) in held.items() if maker == number]:
                del held[block]
            expected.drop(made[number])
        elif deed == "wait":
            now_s += number
            expected.expire(now_s)
            # What is past its time may be seen for a tenth of it longer.
            for slot, held in model.items():
                for block in [block for block, (until_s, _) in held.items() if until_s <= now_s]:
                    if not expected.index.holders.get(block, 0) >> slot & 1:
                        del held[block]
                    else:
                        assert held[block][0] + ttl_s / 10 >= now_s
        for slot, held in model.items():
            believed = {block for block, bits in expected.index.holders.items() if bits >> slot & 1}
            assert believed == set(held)

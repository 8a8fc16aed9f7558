"""Pinned and reserved sequences: their turn, their blocks, and who waits for them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.torch_engine.driver import prompt_of
from tests.unit.torch_engine.test_torch_scheduler import Bench
from trtllm_workers.engines.torch.sequence import Purpose, Sequence

PREFILL, RESERVE = Purpose.PREFILL, Purpose.RESERVE


def test_a_reservation_waits_its_turn_and_needs_no_room_in_the_step() -> None:
    bench = Bench(num_blocks=20, max_num_tokens=16)
    first = bench.add(prompt_of(0, 40), 2)
    reserved = bench.add(prompt_of(1, 20), 4, RESERVE)
    too_long = bench.add(prompt_of(2, 30), 4, RESERVE)
    behind = bench.add(prompt_of(3, 4), 4, RESERVE)
    step = bench.step()
    assert step.prefills == [(first, 16)]  # the whole budget
    assert step.reserved == [reserved]
    assert len(reserved.blocks) == 5
    assert bench.scheduler.waiting == [too_long, behind]
    while first in bench.scheduler.running:
        bench.step()
    assert bench.step().reserved == [too_long, behind]


def test_reservations_count_as_running_and_pinned_ones_do_not() -> None:
    bench = Bench(max_running=2)
    reserved = bench.add(prompt_of(0, 9), 4, RESERVE)
    pinned = bench.add(prompt_of(1, 9), 4, PREFILL)
    last = bench.add(prompt_of(2, 9), 4)
    bench.step()
    assert (bench.scheduler.reserved, bench.scheduler.pinned) == ([reserved], [pinned])
    assert bench.step().prefills == [(last, 9)]
    other = bench.add(prompt_of(3, 9), 4)
    bench.step()
    assert bench.scheduler.waiting == [other]
    bench.scheduler.remove(reserved)
    assert bench.step().prefills == [(other, 9)]


def test_prefills_need_no_room_to_grow() -> None:
    bench = Bench(num_blocks=6)
    sequences = [bench.add(prompt_of(seed, 8), 40, PREFILL) for seed in range(3)]
    bench.step()
    assert bench.scheduler.pinned == sequences
    assert bench.pool.num_available == 0


def test_nobody_waits_for_blocks_that_a_reservation_will_bring() -> None:
    bench = Bench()
    prompt = prompt_of(0, 21)
    reserved = bench.add(prompt, 4, RESERVE)
    same = bench.add(prompt, 4)
    step = bench.step()
    assert (step.reserved, step.prefills) == ([reserved], [(same, 21)])
    bench.resume(reserved, filled=True)  # its blocks give way to the equal ones that are there
    assert reserved.blocks[:5] == same.blocks[:5]
    bench.check()


def test_a_reservation_waits_for_a_running_prefill_of_its_prefix() -> None:
    bench = Bench(max_num_tokens=8)
    prompt = prompt_of(0, 21)
    bench.add(prompt, 4)
    late = bench.add(prompt, 4, RESERVE)
    for _ in range(2):
        assert not bench.step().reserved
    bench.step()
    assert bench.step().reserved == [late]
    assert late.num_stored == 5


def test_an_empty_step_waits_for_what_is_held_and_goes_on_after_it() -> None:
    bench = Bench(num_blocks=10)
    pinned = bench.add(prompt_of(0, 20), 4, PREFILL)
    bench.step()
    waiting = bench.add(prompt_of(1, 24), 4)
    reserving = bench.add(prompt_of(2, 4), 4, RESERVE)
    for _ in range(3):
        step = bench.scheduler.plan()
        assert not step
        assert not step.reserved
    assert bench.scheduler.waiting == [waiting, reserving]
    bench.scheduler.remove(pinned)
    step = bench.step()
    assert (step.prefills, step.reserved) == ([(waiting, 24)], [reserving])


def test_held_sequences_are_not_preempted() -> None:
    bench = Bench(num_blocks=12)
    running = bench.add(prompt_of(0, 4), 40)
    pinned = bench.add(prompt_of(1, 12), 4, PREFILL)
    reserved = bench.add(prompt_of(2, 12), 4, RESERVE)
    bench.step()
    kept = (list(pinned.blocks), list(reserved.blocks))
    while running in bench.scheduler.running:
        bench.step()
    assert bench.scheduler.num_preemptions == 1
    assert (pinned.blocks, reserved.blocks) == kept
    assert not bench.scheduler.plan()
    bench.scheduler.remove(pinned)
    bench.resume(reserved, filled=True)
    while bench.scheduler.running or bench.scheduler.waiting:
        assert bench.step()
        bench.check()
    assert (running.num_output, reserved.num_output) == (40, 4)


@pytest.mark.parametrize("reuse", [True, False])
def test_filled_blocks_are_shared_on_resume_only(reuse: bool) -> None:
    bench = Bench(reuse=reuse)
    sequence = bench.add(prompt_of(0, 22), 4, RESERVE)
    bench.step()
    assert bench.pool.hashes() == set()
    bench.resume(sequence, filled=True)
    assert len(bench.pool.hashes()) == (5 if reuse else 0)
    assert sequence.num_computed == 22
    assert bench.step().decodes == [sequence]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_blocks=st.integers(18, 40),
    max_num_tokens=st.integers(8, 64),
    reuse=st.booleans(),
    chunked=st.booleans(),
)
def test_any_interleaving_ends_and_leaves_no_active_block(
    seed: int, num_blocks: int, max_num_tokens: int, reuse: bool, chunked: bool
) -> None:
    bench = Bench(
        num_blocks,
        reuse=reuse,
        max_num_tokens=max_num_tokens if chunked else 64,
        mixed_prefill_tokens=16,
        chunked_prefill=chunked,
    )
    rng = random.Random(seed)
    scheduler = bench.scheduler

    def held() -> list[Sequence]:
        return [*scheduler.pinned, *scheduler.reserved]

    def end_one_held() -> None:
        sequence = rng.choice(held())
        if sequence in scheduler.pinned or rng.random() < 0.3:
            scheduler.remove(sequence)
        elif sequence.request.sampling.max_tokens == 1:
            bench.resume(sequence, filled=False)
        else:
            bench.resume(sequence, filled=rng.random() < 0.7)

    for _ in range(60):
        act = rng.random()
        everybody = [*scheduler.waiting, *scheduler.running, *held()]
        if act < 0.3:
            prompt = prompt_of(rng.randrange(4), 40)[: rng.randint(1, 40)]
            bench.add(prompt, rng.randint(1, 30), rng.choice(list(Purpose)))
        elif act < 0.4 and everybody:
            scheduler.remove(rng.choice(everybody))
        elif act < 0.55 and held():
            end_one_held()
        elif scheduler.running or scheduler.waiting:
            step = bench.step()
            assert step or step.reserved or held()
        bench.check()
    for _ in range(5000):
        if not (scheduler.running or scheduler.waiting or held()):
            break
        if held():
            end_one_held()
        if scheduler.running or scheduler.waiting:
            step = bench.step()
            assert step or step.reserved or held()
        bench.check()
    assert bench.pool.num_active == 0
    assert bench.pool.num_allocated == bench.pool.num_freed

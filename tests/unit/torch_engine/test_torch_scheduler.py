"""What runs in a step: decode first, in order of arrival, the youngest preempted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.torch_engine.driver import prompt_of, request_of
from trtllm_workers.blocks import root_hash
from trtllm_workers.engines.torch.pool import BlockPool
from trtllm_workers.engines.torch.scheduler import Limits, Scheduler, Step
from trtllm_workers.engines.torch.sequence import Purpose, Sequence

BLOCK = 4
ROOT = root_hash("model")


class Bench:
    """A scheduler and sequences that always sample token 7."""

    def __init__(self, num_blocks: int = 100, *, reuse: bool = True, **limits: Any) -> None:
        chosen = {"max_running": 8, "max_num_tokens": 64, "mixed_prefill_tokens": 64, **limits}
        self.pool = BlockPool(num_blocks, reuse=reuse)
        self.scheduler = Scheduler(Limits(block_size=BLOCK, **chosen), self.pool)
        self.num_added = 0

    def add(
        self, prompt: list[int], max_tokens: int = 5, purpose: Purpose = Purpose.GENERATE
    ) -> Sequence:
        request = request_of(prompt, max_tokens)
        sequence = Sequence(request, self.num_added, ROOT, BLOCK, purpose)
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.plan()
        planned = [*((s, 1) for s in step.decodes), *step.prefills]
        assert sum(count for _s, count in planned) <= self.scheduler.limits.max_num_tokens
        assert len(self.scheduler.running) <= self.scheduler.limits.max_running
        for sequence, count in planned:
            assert count > 0
            assert len(sequence.blocks) * BLOCK >= sequence.num_computed + count
        self.scheduler.commit(step)
        for sequence, _count in planned:
            if not sequence.num_remaining:
                sequence.append(7)
                if sequence.num_output == sequence.request.sampling.max_tokens:
                    self.scheduler.remove(sequence)
                elif sequence.purpose is Purpose.PREFILL:
                    self.scheduler.pin(sequence)
        return step

    def resume(self, sequence: Sequence, *, filled: bool) -> None:
        self.scheduler.resume(sequence, filled=filled)
        if filled:
            sequence.append(7)

    def check(self) -> None:
        """Look at what holds after every act."""
        scheduler, pool = self.scheduler, self.pool
        holders = [*scheduler.running, *scheduler.pinned, *scheduler.reserved]
        held = {block for sequence in holders for block in sequence.blocks}
        assert len(held) == pool.num_active
        assert pool.num_free + pool.num_cached + pool.num_active == pool.num_blocks
        assert pool.num_allocated - pool.num_freed == sum(len(s.blocks) for s in holders)
        assert not any(sequence.blocks for sequence in scheduler.waiting)
        private = [
            block
            for sequence in holders
            for block in sequence.blocks[sequence.num_stored if pool.reuse else 0 :]
        ]
        assert len(private) == len(set(private))


def test_decodes_come_before_prefills_and_long_prompts_advance_in_pieces() -> None:
    bench = Bench(mixed_prefill_tokens=16)
    short = bench.add(prompt_of(0, 5), 50)
    assert bench.step().prefills == [(short, 5)]
    long = bench.add(prompt_of(1, 40))
    for expected in (16, 16, 8):
        step = bench.step()
        assert step.decodes == [short]
        assert step.prefills == [(long, expected)]
    assert bench.step().decodes == [short, long]


def test_waiting_sequences_are_admitted_in_order_and_nobody_overtakes() -> None:
    bench = Bench(num_blocks=12)
    first = bench.add(prompt_of(0, 20), 8)
    second = bench.add(prompt_of(1, 30), 2)  # does not fit beside the first
    third = bench.add(prompt_of(2, 4), 2)  # would
    assert [s for s, _n in bench.step().prefills] == [first]
    while first in bench.scheduler.running:
        assert second in bench.scheduler.waiting
        assert third in bench.scheduler.waiting
        bench.step()
    assert [s for s, _n in bench.step().prefills] == [second, third]


def test_the_youngest_is_preempted_and_comes_back_in_its_place() -> None:
    bench = Bench(num_blocks=6)
    old = bench.add(prompt_of(0, 4), 20)
    young = bench.add(prompt_of(1, 4), 12)
    later = bench.add(prompt_of(2, 24), 1)
    while not bench.scheduler.num_preemptions:
        bench.step()
    assert bench.scheduler.running == [old]
    assert bench.scheduler.waiting == [young, later]
    assert (young.blocks, young.num_computed) == ([], 0)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    assert (old.num_output, young.num_output, later.num_output) == (20, 12, 1)


def test_a_sequence_waits_for_an_older_one_that_computes_its_prefix() -> None:
    bench = Bench(max_num_tokens=16)
    shared = prompt_of(0, 20)
    first = bench.add([*shared, 1], 3)
    second = bench.add([*shared, 2], 3)
    other = bench.add(prompt_of(1, 3), 3)
    assert [s for s, _n in bench.step().prefills] == [first]
    step = bench.step()
    assert [s for s, _n in step.prefills] == [first, other]
    assert bench.scheduler.waiting == [second]
    assert (second, 1) in bench.step().prefills
    assert second.cached_tokens == 20


def test_removing_the_older_one_lets_those_go_on_that_waited_for_it() -> None:
    bench = Bench(max_num_tokens=8)
    prompt = prompt_of(0, 21)
    first, second = bench.add(prompt), bench.add(prompt)
    bench.step()
    bench.scheduler.remove(first)
    assert [s for s, _n in bench.step().prefills] == [second]
    assert second.cached_tokens == 8


def test_without_chunking_a_prompt_is_computed_in_one_step() -> None:
    bench = Bench(chunked_prefill=False, max_num_tokens=20, mixed_prefill_tokens=4)
    first = bench.add(prompt_of(0, 15), 3)
    second = bench.add(prompt_of(1, 20), 3)
    assert bench.step().prefills == [(first, 15)]
    bench.step()
    assert bench.step().decodes == [first]  # 19 tokens were left: not enough for the second
    assert bench.step().prefills == [(second, 20)]


@settings(max_examples=150, deadline=None)
@given(
    work=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 30), st.integers(0, 4)),
        min_size=1,
        max_size=12,
    ),
    num_blocks=st.integers(18, 40),
    max_num_tokens=st.integers(8, 64),
    reuse=st.booleans(),
)
def test_any_work_ends_and_leaves_no_active_block(
    work: list[tuple[int, int, int, int]], num_blocks: int, max_num_tokens: int, reuse: bool
) -> None:
    bench = Bench(num_blocks, reuse=reuse, max_num_tokens=max_num_tokens, mixed_prefill_tokens=16)
    sequences = []
    for which, length, max_tokens, steps_before in work:
        sequences.append(bench.add(prompt_of(which, 40)[:length], max_tokens))
        for _ in range(steps_before):
            if bench.scheduler.running or bench.scheduler.waiting:
                bench.step()
    for _ in range(3000):
        if not (bench.scheduler.running or bench.scheduler.waiting):
            break
        assert bench.step()
    assert [s.num_output for s in sequences] == [max_tokens for _w, _l, max_tokens, _s in work]
    assert bench.pool.num_active == 0


@pytest.mark.parametrize("reuse", [True, False])
def test_prompt_tokens_are_counted_once_whatever_is_preempted(reuse: bool) -> None:
    bench = Bench(num_blocks=8, reuse=reuse)
    for which in range(4):
        bench.add(prompt_of(which, 6), 20)
    while bench.scheduler.running or bench.scheduler.waiting:
        bench.step()
    assert bench.scheduler.num_preemptions > 0
    assert bench.scheduler.prompt_tokens == 24

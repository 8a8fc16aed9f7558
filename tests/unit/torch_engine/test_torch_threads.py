"""One thread while cores are contended, all of them again afterwards; tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.unit.torch_engine.driver import Driver, prompt_of
from trtllm_workers.engines.torch.threads import (
    LEAST_SHARE,
    LONGEST_HOLD_S,
    MOST_SWITCHES_PER_S,
    SHORTEST_HOLD_S,
    WINDOW_S,
    ThreadGovernor,
)

FREE, CONTENDED = 0.98, LEAST_SHARE - 0.1


class Host:
    """A clock, the process's CPU time and its context switches, all turned by hand."""

    def __init__(self, num_threads: int = 4) -> None:
        self.num_threads = num_threads
        self.now_s = self.cpu_s = self.switches = 0.0
        self.set: list[int] = []
        self.governor = ThreadGovernor(
            num_threads,
            self.set.append,
            clock=lambda: self.now_s,
            cpu_time=lambda: self.cpu_s,
            switches=lambda: self.switches,
        )

    def run(
        self, seconds: float, share: float, *, idle_s: float = 0.0, asleep: bool = False
    ) -> None:
        for _ in range(round(seconds / 0.05)):
            self.governor.before_step()
            self.now_s += 0.05
            self.cpu_s += 0.05 * share * self.num_threads
            contended = share == CONTENDED and not asleep
            self.switches += 0.05 * MOST_SWITCHES_PER_S * (2 if contended else 0.5)
            self.governor.after_step()
            self.now_s += idle_s


def test_free_cores_change_nothing() -> None:
    host = Host()
    host.run(30, FREE)
    assert host.set == []


def test_idle_time_between_steps_is_not_taken_for_contention() -> None:
    host = Host()
    host.run(10, FREE, idle_s=1.0)
    assert host.set == []


def test_threads_that_wait_asleep_are_not_taken_for_contention() -> None:
    host = Host()
    host.run(10, CONTENDED, asleep=True)
    assert host.set == []


def test_contention_leads_to_one_thread_and_its_end_to_all_again() -> None:
    host = Host()
    host.run(1, FREE)
    host.run(2 * WINDOW_S, CONTENDED)
    assert host.set == [1]
    host.run(SHORTEST_HOLD_S, FREE)
    assert host.set == [1, 4]
    host.run(10, FREE)
    assert host.set == [1, 4]


def test_lasting_contention_is_tried_ever_more_rarely_and_forgotten_when_over() -> None:
    host = Host()
    host.run(600, CONTENDED)
    assert 10 < len(host.set) < 40
    host.run(2 * LONGEST_HOLD_S, FREE)
    assert host.set[-1] == 4
    host.run(2 * WINDOW_S, CONTENDED)
    assert host.set[-1] == 1
    host.run(SHORTEST_HOLD_S, FREE)
    assert host.set[-1] == 4


def test_a_single_thread_is_left_alone() -> None:
    host = Host(num_threads=1)
    host.run(10, CONTENDED)
    assert host.set == []


def test_changing_the_number_of_threads_between_steps_changes_no_token(
    driver: Callable[..., Driver],
) -> None:
    for family in ("llama", "wide_bfloat16"):
        expected = driver(family).ask(prompt_of(0, 300), 30)
        drive = driver(family, max_num_tokens=100)
        key = drive.add(prompt_of(0, 300), 30)
        while not drive.core.is_idle:
            torch.set_num_threads(3 - torch.get_num_threads())
            drive.step()
        assert drive.tokens(key) == expected

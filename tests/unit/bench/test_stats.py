from __future__ import annotations

import statistics

import numpy as np
import pytest

from tests.unit.bench.made import level, load, record
from trtllm_workers.bench.results import level_of
from trtllm_workers.bench.stats import (
    bootstrap_change,
    distribution,
    paired_change,
    percentile,
)


def test_percentiles_are_those_of_the_standard_library() -> None:
    values = [((7 * n) % 101) ** 1.5 for n in range(250)]
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    told = distribution(values)
    assert told.n == 250
    assert told.p50 == pytest.approx(cuts[49])
    assert told.p90 == pytest.approx(cuts[89])
    assert told.p99 == pytest.approx(cuts[98])
    assert told.mean == pytest.approx(statistics.fmean(values))


def test_no_percentile_is_claimed_beyond_the_sample() -> None:
    assert percentile([1.0] * 99, 99) is None
    assert percentile([1.0] * 100, 99) == 1.0
    assert percentile([1.0] * 9, 90) is None
    told = distribution([])
    assert (told.n, told.mean, told.p50) == (0, None, None)


def test_a_change_within_the_samples_is_not_certain_and_one_beyond_is() -> None:
    dice = np.random.default_rng(1)
    one = list(dice.normal(1.0, 0.2, 200))
    same = list(dice.normal(1.0, 0.2, 200))
    slower = list(dice.normal(1.3, 0.2, 200))
    within, beyond = bootstrap_change(one, same, 50), bootstrap_change(one, slower, 50)
    assert within is not None
    assert beyond is not None
    assert not within.certain
    assert beyond.certain
    assert beyond.share == pytest.approx(0.3, abs=0.06)
    assert beyond.low is not None
    assert beyond.high is not None
    assert beyond.low < beyond.share < beyond.high


def test_the_bootstrap_interval_of_a_mean_is_about_the_textbooks() -> None:
    dice = np.random.default_rng(2)
    one, other = dice.normal(10, 1, 400), dice.normal(10, 1, 400)
    change = bootstrap_change(list(one), list(other), None)
    assert change is not None
    assert change.low is not None
    assert change.high is not None
    error = np.sqrt(one.var() / 400 + other.var() / 400) / 10
    assert change.high - change.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_samples_too_small_for_a_percentile_give_no_change() -> None:
    assert bootstrap_change([1.0] * 9, [1.0] * 20, 90) is None
    assert bootstrap_change([0.0] * 20, [1.0] * 20, 50) is None


def test_paired_rounds_see_through_what_slows_both() -> None:
    before = [1.0, 2.0, 4.0, 8.0]
    change = paired_change(before, [1.1, 2.21, 4.39, 8.8])
    assert change is not None
    assert change.certain
    assert change.share == pytest.approx(0.1, abs=0.005)


def test_paired_bounds_are_those_of_students_t() -> None:
    # log ratios -0.1, 0, 0.1: mean 0, standard deviation 0.1, t(2) = 4.303
    change = paired_change([1.0] * 3, list(np.exp([-0.1, 0.0, 0.1])))
    assert change is not None
    assert change.high == pytest.approx(np.expm1(4.303 * 0.1 / 3**0.5))
    assert not change.certain


def test_one_pair_has_no_bounds() -> None:
    change = paired_change([1.0], [2.0])
    assert change is not None
    assert (change.low, change.certain) == (None, False)
    assert paired_change([0.0], [2.0]) is None


def test_a_level_counts_good_requests_alone_and_names_the_others() -> None:
    good = [record(n, start_s=n * 0.5) for n in range(4)]
    bad = record(4, start_s=2.0, ttft_s=50.0)
    bad.problem = "HTTP 500: no"
    made = level_of(load(1, 5), [*good, bad], cpu_s=1.0)
    assert (made.num_good, made.num_failed, made.failures) == (4, 1, {"HTTP 500: no": 1})
    assert made.ttft_s.max == pytest.approx(0.1)
    assert made.itl_s.p50 == pytest.approx(0.01)
    assert made.output_tokens == 44
    assert made.duration_s == pytest.approx(bad.end_s)
    assert made.tokens_per_s == pytest.approx(44 / bad.end_s)
    assert not made.valid


def test_one_percent_may_fail() -> None:
    assert level(num_requests=100, num_failed=1).valid
    assert not level(num_requests=100, num_failed=2).valid


def test_time_in_stalls_is_what_gaps_have_beyond_the_usual() -> None:
    one = record(osl=11)
    for index in range(6, 11):
        one.chunks_s[index] += 0.1  # one gap of 0.11 s among nine of 0.01 s
    made = level_of(load(1, 1), [one])
    assert made.stalled_share == pytest.approx(0.1 / 0.2)


def test_ttft_counts_from_the_intended_start() -> None:
    late = record(start_s=3.0, ttft_s=0.1)
    late.intended_s = 1.0
    assert late.ttft_s == pytest.approx(2.1)
    assert late.latency_s == pytest.approx(2.2)

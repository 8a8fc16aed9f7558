from __future__ import annotations

import itertools
import statistics

import pytest

from trtllm_workers.bench.started import Split, parse_splits, require_free, splits_of
from trtllm_workers.bench.workload import (
    Load,
    arrivals,
    closed_loops,
    open_loops,
    parse_levels,
    parse_rates,
)
from trtllm_workers.errors import ConfigError


def test_levels_have_ten_requests_and_two_warm_up_requests_for_each_stream() -> None:
    one, four = closed_loops(parse_levels("1, 4"))
    assert (one.num_requests, one.num_warmup, one.name) == (10, 2, "concurrency1")
    assert (four.num_requests, four.num_warmup, four.in_words) == (40, 8, "4")
    assert closed_loops([4], 7, 0)[0] == Load(concurrency=4, num_requests=7, num_warmup=0)


@pytest.mark.parametrize("text", ["", ",", "0", "-1", "1.5", "a", "1,1", "1,,x", "99999999", "²"])
def test_a_level_that_is_no_number_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--concurrency"):
        parse_levels(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "fast", "1,1"])
def test_a_rate_that_is_no_number_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--request-rate"):
        parse_rates(text)


def test_arrivals_are_a_poisson_process_and_the_same_for_a_seed() -> None:
    load = open_loops(parse_rates("50"), 2000)[0]
    times = arrivals(load, 1)
    assert times == arrivals(load, 1) != arrivals(load, 2)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.1)


def test_workers_are_split_in_every_way_or_in_three() -> None:
    assert [one.name for one in splits_of(2)] == ["1 prefill + 1 decode"]
    assert [one.prefill for one in splits_of(4)] == [1, 2, 3]
    assert [one.prefill for one in splits_of(8)] == [2, 4, 6]
    assert [one.prefill + one.decode for one in splits_of(7)] == [7, 7, 7]
    with pytest.raises(ConfigError, match="--workers 1"):
        splits_of(1)


def test_splits_given_must_use_all_workers() -> None:
    assert parse_splits("1+3, 2+2", 4) == [Split(1, 3), Split(2, 2)]
    for text in ("1+2", "0+4", "4", "a+b", ""):
        with pytest.raises(ConfigError, match="--splits"):
            parse_splits(text, 4)


def test_what_the_verdict_decides_is_not_passed_on() -> None:
    require_free(["--model-path", "/m", "--set", "max_batch_size=4"])
    for word in ("--num-workers", "--http-port=1", "--disaggregated"):
        with pytest.raises(ConfigError, match="is the verdict's to decide"):
            require_free([word])

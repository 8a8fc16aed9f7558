from __future__ import annotations

from typing import Any

import pytest

from tests.unit.bench.made import WORKLOAD, level
from trtllm_workers.bench.report import as_text
from trtllm_workers.bench.verdict import Candidate, Objective, Verdict, judge

WOBBLE = (0.99, 1.0, 1.01, 1.0)


def candidate(
    name: str, *, streams: tuple[int, ...] = (8,), texts: tuple[str, ...] = ("t",), **figures: Any
) -> Candidate:
    """Return a candidate whose four rounds differ by 1 % from each other."""
    ttft_s, itl_s = figures.pop("ttft_s", 0.1), figures.pop("itl_s", 0.01)
    return Candidate(
        name=name,
        rounds={
            f"concurrency{n}": [
                level(n, ttft_s=ttft_s * one, itl_s=itl_s * other, **figures)
                for one, other in zip(WOBBLE, reversed(WOBBLE), strict=True)
            ]
            for n in streams
        },
        alone=level(1, ttft_s=0.05, itl_s=0.008, num_requests=20),
        texts=list(texts),
    )


AGGREGATED = candidate("2 aggregated")


def verdict(
    split: Candidate, objective: Objective | None = None, aggregated: Candidate = AGGREGATED
) -> Verdict:
    return judge(WORKLOAD, objective, aggregated, [split])


def test_better_in_something_and_worse_in_nothing_is_better() -> None:
    found = verdict(candidate("1+1", itl_s=0.005))
    assert found.outcome == "disaggregated"
    assert found.headline == "1+1 is better for this workload"
    assert found.levels[0].changes["ITL p50"].share == pytest.approx(-0.5, abs=0.02)
    assert any("carry prefill for others" in reason for reason in found.levels[0].reasons)


def test_worse_in_something_and_better_in_nothing_leaves_aggregated() -> None:
    assert verdict(candidate("1+1", ttft_s=0.2)).outcome == "aggregated"
    assert verdict(candidate("1+1", itl_s=0.02, ttft_s=0.2)).outcome == "aggregated"


def test_better_here_and_worse_there_is_a_trade_off_with_a_break_even() -> None:
    found = verdict(candidate("1+1", ttft_s=0.15, itl_s=0.005))
    assert found.outcome == "trade-off"
    # 50 ms later, then 5 ms less per token: even after 10 more tokens than the first
    assert "more than about 11 tokens end sooner disaggregated" in found.levels[0].break_even
    other = verdict(candidate("1+1", ttft_s=0.05, itl_s=0.015))
    assert "more than about 11 tokens end sooner aggregated" in other.levels[0].break_even


def test_what_is_alike_is_no_difference() -> None:
    found = verdict(candidate("1+1"))
    assert (found.outcome, found.headline) == ("no difference", "no difference above noise")
    assert found.levels[0].break_even == ""


def test_noise_between_rounds_is_not_taken_for_a_difference() -> None:
    noisy = candidate("1+1")
    noisy.rounds["concurrency8"] = [
        level(8, ttft_s=0.1 * factor, itl_s=0.01 * factor) for factor in (0.7, 1.5, 0.8, 1.4)
    ]
    found = verdict(noisy)
    assert found.outcome == "no difference"
    assert found.levels[0].break_even == ""
    assert not any(
        "bottleneck" in reason or "carry" in reason for reason in found.levels[0].reasons
    )


def test_an_objective_decides_by_requests_within_it() -> None:
    split = candidate("1+1", ttft_s=0.15, itl_s=0.005)
    assert verdict(split, Objective(itl_s=0.008)).outcome == "disaggregated"
    assert verdict(split, Objective(ttft_s=0.12)).outcome == "aggregated"
    assert verdict(split, Objective(ttft_s=0.01)).outcome == "neither"
    both = verdict(split, Objective(ttft_s=0.5, itl_s=0.5))
    assert both.levels[0].goodput["1+1"] > 0
    assert "goodput" in both.levels[0].changes


def test_failed_requests_forbid_a_verdict() -> None:
    found = verdict(candidate("1+1", num_failed=5))
    assert found.outcome == "invalid"
    assert "no verdict" in found.headline


def test_the_best_split_is_compared() -> None:
    slow, fast = candidate("1+3", itl_s=0.03), candidate("2+2", itl_s=0.005)
    found = judge(WORKLOAD, None, AGGREGATED, [slow, fast])
    assert found.levels[0].best == "2+2"


def test_a_verdict_may_depend_on_the_load() -> None:
    aggregated = candidate("2 aggregated", streams=(1, 8))
    split = candidate("1+1", streams=(1,), ttft_s=0.2)
    split.rounds |= candidate("1+1", itl_s=0.005).rounds
    found = verdict(split, aggregated=aggregated)
    assert found.outcome == "trade-off"
    assert found.headline == "it depends on the load: aggregated at 1, disaggregated at 8"


def test_other_greedy_answers_are_told() -> None:
    assert verdict(candidate("1+1")).same_text is True
    found = verdict(candidate("1+1", texts=("u",)))
    assert (found.same_text, found.different) == (False, ["1+1"])
    assert "GREEDY ANSWERS DIFFER from the aggregated ones: 1+1" in as_text(found, [])


@pytest.mark.parametrize(
    ("phases", "reason"),
    [
        ({"queue": 0.5, "prefill": 0.1}, "83% of that is waiting for a prefill worker"),
        ({"transfer": 0.5, "prefill": 0.5}, "50% of that is moving KV"),
    ],
)
def test_reasons_come_from_the_servers_own_times(phases: dict[str, float], reason: str) -> None:
    found = verdict(candidate("1+1", ttft_s=0.2, phases_s=phases))
    assert any(reason in one for one in found.levels[0].reasons)


def test_fewer_decode_workers_are_named_as_the_reason() -> None:
    found = verdict(candidate("1+1", itl_s=0.02))
    assert any("decode is its bottleneck" in one for one in found.levels[0].reasons)


def test_the_text_has_every_figure_with_its_bounds() -> None:
    text = as_text(verdict(candidate("1+1", itl_s=0.005)), ["mind the gap"])
    assert "verdict: 1+1 is better for this workload" in text
    assert "ITL p50 ms" in text
    assert "95 % between" in text
    assert "note: mind the gap" in text
    assert "greedy answers are the same" in text

"""Which of two deployments on the same workers is better for a workload, and why. Pure.

Rounds of both are compared in pairs (``stats.paired_change``), and only what is above noise counts::

    an objective was given (--ttft-ms, --itl-ms)   requests per second that meet it decide
    else                                           better somewhere, worse nowhere: better
                                                   better here and worse there:     a trade-off
                                                   neither:                         no difference
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from trtllm_workers.bench.reasons import break_even, reasons
from trtllm_workers.bench.results import Level
from trtllm_workers.bench.stats import Change, paired_change
from trtllm_workers.bench.workload import Load, Workload

Outcome = Literal["aggregated", "disaggregated", "trade-off", "no difference", "neither", "invalid"]

_WIDE = 10  # requests a round needs for its p90


class Objective(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to, in seconds; None: no bound."""

    ttft_s: float | None = None
    itl_s: float | None = None

    def goodput(self, level: Level) -> float:
        """Return the requests per second that keep to it."""
        samples = level.samples
        # A request of one token has no ITL; then no sample list of another length may be zipped.
        itls = (
            samples.itl_s if len(samples.itl_s) == len(samples.ttft_s) else [0.0] * level.num_good
        )
        met = sum(
            (self.ttft_s is None or ttft <= self.ttft_s)
            and (self.itl_s is None or itl <= self.itl_s)
            for ttft, itl in zip(samples.ttft_s, itls, strict=True)
        )
        return met / level.duration_s


class Candidate(msgspec.Struct, kw_only=True):
    """One way to use the workers, measured: rounds by level, and ``alone`` one request at a time.

    ``texts`` are its greedy answers to prompts that all candidates got.
    """

    name: str
    rounds: dict[str, list[Level]] = {}
    alone: Level | None = None
    texts: list[str] = []


class LevelVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What is better at one level. ``best`` is the best way to split the workers there.

    ``changes`` go from aggregated to that split; for latencies less is better.
    """

    load: Load
    outcome: Outcome
    best: str
    changes: dict[str, Change]
    goodput: dict[str, float]
    reasons: list[str]
    break_even: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The whole: ``same_text`` None when no text was compared."""

    outcome: Outcome
    headline: str
    levels: list[LevelVerdict]
    same_text: bool | None
    different: list[str]


def judge(
    workload: Workload,
    objective: Objective | None,
    aggregated: Candidate,
    splits: Sequence[Candidate],
) -> Verdict:
    """Return which is better at each level, and over all of them."""
    levels = [
        _judge_level(workload, objective, name, aggregated, splits) for name in aggregated.rounds
    ]
    different = [one.name for one in splits if one.texts != aggregated.texts]
    outcomes = {level.outcome for level in levels}
    outcome: Outcome = "trade-off"
    if "invalid" in outcomes:
        outcome = "invalid"
    elif len(outcomes) == 1:
        outcome = levels[0].outcome
    elif len(found := outcomes - {"no difference", "neither"}) == 1:
        outcome = found.pop()
    return Verdict(
        outcome=outcome,
        headline=_headline(outcome, levels),
        levels=levels,
        same_text=not different if aggregated.texts else None,
        different=different,
    )


def _judge_level(
    workload: Workload,
    objective: Objective | None,
    name: str,
    aggregated: Candidate,
    splits: Sequence[Candidate],
) -> LevelVerdict:
    ours = aggregated.rounds[name]
    best = max(splits, key=lambda one: _merit(one.rounds[name], objective))
    theirs = best.rounds[name]
    goodput = {}
    if objective is not None:
        for one in (aggregated, *splits):
            goodput[one.name] = _mean([objective.goodput(level) for level in one.rounds[name]])
    changes = _changes(ours, theirs, objective)
    measured = [level for one in (aggregated, *splits) for level in one.rounds[name]]
    if not all(level.valid for level in measured):
        outcome: Outcome = "invalid"
    elif objective is not None:
        outcome = _by_objective(
            changes.get("goodput"), goodput[aggregated.name], goodput[best.name]
        )
    else:
        outcome = _by_figures(changes)
    return LevelVerdict(
        load=ours[0].load,
        outcome=outcome,
        best=best.name,
        changes=changes,
        goodput=goodput,
        reasons=reasons(ours, aggregated.alone, theirs, best.alone, best.name, changes),
        break_even=break_even(workload, ours, theirs, changes),
    )


def _by_objective(change: Change | None, ours: float, theirs: float) -> Outcome:
    if ours == theirs == 0:
        return "neither"
    if change is None:  # in some round nothing of one of them met it
        return "disaggregated" if theirs > ours else "aggregated"
    if not change.certain:
        return "no difference"
    return "disaggregated" if change.share > 0 else "aggregated"


def _by_figures(changes: dict[str, Change]) -> Outcome:
    better = worse = False
    for name, change in changes.items():
        if change.certain:
            improved = (change.share > 0) == (name in ("tokens/s", "goodput"))
            better, worse = better or improved, worse or not improved
    if better and worse:
        return "trade-off"
    if better:
        return "disaggregated"
    return "aggregated" if worse else "no difference"


def _changes(
    ours: Sequence[Level], theirs: Sequence[Level], objective: Objective | None
) -> dict[str, Change]:
    """Return the changes that can be told. An open loop's throughput is what was asked for."""
    tail = "p99" if all(level.itl_s.p99 is not None for level in (*ours, *theirs)) else "p90"
    figures: dict[str, tuple[list[float | None], list[float | None]]] = {}
    if objective is not None:
        figures["goodput"] = (
            [objective.goodput(level) for level in ours],
            [objective.goodput(level) for level in theirs],
        )
    if ours[0].load.concurrency is not None:
        figures["tokens/s"] = (
            [one.tokens_per_s for one in ours],
            [one.tokens_per_s for one in theirs],
        )
    for what, field in (("TTFT", "ttft_s"), ("ITL", "itl_s")):
        for key in ("p50", tail if what == "ITL" else "p90"):
            figures[f"{what} {key}"] = (
                [getattr(getattr(one, field), key) for one in ours],
                [getattr(getattr(one, field), key) for one in theirs],
            )
    changes = {}
    for name, (before, after) in figures.items():
        one, other = _known(before), _known(after)
        if len(one) == len(before) and len(other) == len(after):
            change = paired_change(one, other)
            if change is not None:
                changes[name] = change
    return changes


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _merit(levels: Sequence[Level], objective: Objective | None) -> float:
    """Return what splits are chosen by: goodput, else whole requests done in a time."""
    if objective is not None and (goodput := _mean([objective.goodput(one) for one in levels])):
        return goodput
    return -_mean([one.latency_s.mean or float("inf") for one in levels])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _headline(outcome: Outcome, levels: Sequence[LevelVerdict]) -> str:
    splits = sorted({level.best for level in levels})
    best = splits[0] if len(splits) == 1 else "disaggregated"
    if len({level.outcome for level in levels}) == 1:
        return {
            "aggregated": "aggregated is better for this workload",
            "disaggregated": f"{best} is better for this workload",
            "trade-off": "a trade-off: each is better in some figure; an objective "
            "(--ttft-ms, --itl-ms) would decide",
            "no difference": "no difference above noise",
            "neither": "not one request of either met the objective",
            "invalid": "no verdict: more than 1 % of the requests of some round went wrong",
        }[outcome]
    if outcome == "invalid":
        return "no verdict: more than 1 % of the requests of some round went wrong"
    told = [f"{level.outcome} at {level.load.in_words}" for level in levels]
    return f"it depends on the load: {', '.join(told)}"

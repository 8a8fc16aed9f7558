"""A verdict as text for people and as JSON for programs. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from trtllm_workers.bench.results import SCHEMA_VERSION
from trtllm_workers.bench.stats import Change
from trtllm_workers.bench.tables import ms, percent, plain
from trtllm_workers.bench.verdict import LevelVerdict, Verdict
from trtllm_workers.config.tables import table

_RATES = ("tokens/s", "goodput")


def as_text(verdict: Verdict, notes: Sequence[str]) -> str:
    """Return what a verdict says."""
    lines = [f"verdict: {verdict.headline}"]
    for level in verdict.levels:
        lines += ["", *_level(level)]
    lines.append("")
    if verdict.same_text is None:
        lines.append("greedy answers were not compared")
    elif verdict.same_text:
        lines.append("greedy answers are the same")
    else:
        names = ", ".join(verdict.different)
        lines.append(f"GREEDY ANSWERS DIFFER from the aggregated ones: {names}")
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)


def write_verdict(path: Path, verdict: Verdict, notes: Sequence[str]) -> None:
    """Write it as JSON."""
    told = {
        "schema_version": SCHEMA_VERSION,
        **msgspec.to_builtins(verdict),
        "notes": list(notes),
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n")


def _level(level: LevelVerdict) -> list[str]:
    streams = "streams" if level.load.concurrency is not None else "requests arriving"
    lines = [f"{level.load.in_words} {streams}: {level.outcome} (aggregated against {level.best})"]
    rows = [_row(name, change) for name, change in level.changes.items()]
    if rows:
        header = ("figure", "aggregated", level.best, "change", "95 % between", "")
        lines += [f"  {line}" for line in table(header, rows).splitlines()]
    if level.goodput:
        each = ", ".join(f"{name} {rate:.2f}" for name, rate in level.goodput.items())
        lines.append(f"  requests/s within the objective: {each}")
    lines += [f"  · {reason}" for reason in level.reasons]
    if level.break_even:
        lines.append(f"  · {level.break_even}")
    return lines


def _row(name: str, change: Change) -> tuple[str, ...]:
    rate = name in _RATES
    shown = plain if rate else ms
    between = "one round: not known"
    verdict = "within noise"
    if change.low is not None and change.high is not None:
        between = f"{percent(change.low)} to {percent(change.high)}"
    if change.certain:
        verdict = "better" if (change.share > 0) == rate else "worse"
    unit = {"goodput": " req/s", "tokens/s": ""}.get(name, " ms")
    return (
        f"{name}{unit}",
        shown(change.before),
        shown(change.after),
        percent(change.share),
        between,
        verdict,
    )

"""Two sweeps side by side: what changed, by how much, and whether that is more than chance. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm_workers.bench.results import Level, Results
from trtllm_workers.bench.stats import Change, bootstrap_change
from trtllm_workers.bench.tables import ms, percent
from trtllm_workers.config.tables import table

# (name, where its samples lie, percentile, whether less is better); throughput stands apart.
_LATENCIES = (
    ("TTFT p50", "ttft_s", 50),
    ("TTFT p90", "ttft_s", 90),
    ("ITL p50", "itl_s", 50),
    ("ITL p90", "itl_s", 90),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One figure at one level. ``change`` is None where it cannot be told."""

    level: str
    figure: str
    before: float | None
    after: float | None
    change: Change | None
    less_is_better: bool

    @property
    def worse_by(self) -> float:
        """Return by which share it became worse for certain; 0 when it did not, or by chance."""
        if self.change is None or not self.change.certain:
            return 0.0
        share = self.change.share
        if self.less_is_better:
            return max(0.0, share)
        return max(0.0, -share)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing; ``warnings`` say why the two may not be comparable."""

    rows: Sequence[Row]
    warnings: Sequence[str]

    def regressions(self, above: float) -> list[Row]:
        """Return the figures that became worse by more than the share ``above``, noise aside."""
        return [row for row in self.rows if row.worse_by > above]


def compare(before: Results, after: Results) -> Comparison:
    """Return how the levels that both sweeps have differ.

    Latencies: both samples of requests are drawn anew 1,000 times; a change is above noise when the 95 %
    interval of its size excludes zero and it is 1 % at least. Throughput of a closed loop is streams × tokens ÷ mean latency, so
    its bounds lie about it as those of the mean latency do; that of an open loop is what was asked for.
    """
    theirs = {level.load.in_words: level for level in after.levels}
    rows: list[Row] = []
    for level in before.levels:
        other = theirs.get(level.load.in_words)
        if other is not None:
            rows += _rows(level, other)
    return Comparison(rows, _warnings(before, after))


def as_table(comparison: Comparison) -> str:
    """Return the rows as text."""
    lines = []
    for row in comparison.rows:
        show = (lambda value: "-" if value is None else f"{value:,.1f}") if _is_rate(row) else ms
        change = row.change
        if change is None or change.low is None or change.high is None:
            cells = ("-", "", "too few samples")
        else:
            verdict = "within noise"
            if change.certain:
                verdict = "WORSE" if row.worse_by else "better"
            between = f"{percent(change.low)} to {percent(change.high)}"
            cells = (percent(change.share), between, verdict)
        lines.append((row.level, row.figure, show(row.before), show(row.after), *cells))
    header = ("load", "figure", "before", "after", "change", "95 % between", "")
    return table(header, lines)


def _rows(before: Level, after: Level) -> list[Row]:
    name = before.load.in_words
    slower = bootstrap_change(before.samples.latency_s, after.samples.latency_s, None)
    change = None
    if before.load.concurrency is not None and slower is not None and before.tokens_per_s > 0:
        assert slower.low is not None, "a bootstrap has bounds"
        assert slower.high is not None, "a bootstrap has bounds"
        ratio = after.tokens_per_s / before.tokens_per_s
        change = Change(
            before=before.tokens_per_s,
            after=after.tokens_per_s,
            share=ratio - 1,
            low=ratio * (1 + slower.share) / (1 + slower.high) - 1,
            high=ratio * (1 + slower.share) / (1 + slower.low) - 1,
        )
    rows = [Row(name, "tokens/s", before.tokens_per_s, after.tokens_per_s, change, False)]
    for figure, samples, percentile in _LATENCIES:
        one, other = getattr(before.samples, samples), getattr(after.samples, samples)
        found = bootstrap_change(one, other, percentile)
        key = f"p{percentile}"
        old, new = getattr(getattr(before, samples), key), getattr(getattr(after, samples), key)
        rows.append(Row(name, f"{figure} ms", old, new, found, True))
    return rows


def _warnings(before: Results, after: Results) -> list[str]:
    found = []
    for what, one, other in (
        ("model", before.deployment.model, after.deployment.model),
        ("ISL", before.workload.isl, after.workload.isl),
        ("OSL", before.workload.osl, after.workload.osl),
        ("shared prefix", before.workload.shared_prefix, after.workload.shared_prefix),
        ("ignore_eos", before.workload.ignore_eos, after.workload.ignore_eos),
        ("engine", before.deployment.engine, after.deployment.engine),
        ("device", before.deployment.device, after.deployment.device),
        ("mode", before.deployment.mode, after.deployment.mode),
        ("workers", before.deployment.num_workers, after.deployment.num_workers),
        ("client", before.client, after.client),
        ("client's host", before.environment.host, after.environment.host),
        ("client's processor", before.environment.processor, after.environment.processor),
    ):
        if one != other:
            found.append(f"{what} differs: {_shown(one)} before, {_shown(other)} after")
    ours = {level.load.in_words for level in before.levels}
    theirs = {level.load.in_words for level in after.levels}
    if left := sorted(ours ^ theirs):
        found.append(f"only one of the two has level {', '.join(left)}; it is left out")
    if not ours & theirs:
        found.append("they have no level in common: nothing is compared")
    for name, results in (("before", before), ("after", after)):
        wrong = [level.load.in_words for level in results.levels if not level.valid]
        if wrong:
            found.append(f"{name}: level {', '.join(wrong)} is invalid (failed requests)")
    return found


def _is_rate(row: Row) -> bool:
    return not row.less_is_better


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{number} {role}" for role, number in value.items()) or "not told"
    return str(value) or "not told"

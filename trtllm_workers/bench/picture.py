"""Which figures of a sweep go into which chart. Draws nothing itself."""

from __future__ import annotations

from collections.abc import Sequence

from trtllm_workers.bench.results import Level, Results
from trtllm_workers.bench.stats import Distribution
from trtllm_workers.bench.svg import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    Chart,
    Point,
    Series,
    document,
)

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
_WIDTH, _HEIGHT = 1160.0, 610.0
_WIDE_SPREAD = 12.0
_DASHES = {"p50": "", "p90": "7 4", "p99": "2 4"}
_MARKERS = {"p50": "circle", "p90": "square", "p99": "triangle"}


def sweep_picture(results: Results) -> str:
    """Return the picture of one sweep."""
    real, workload = results.deployment, results.workload
    return _picture(
        f"{real.model}: ISL {workload.isl:,}, OSL {workload.osl:,}",
        f"{real.in_words} · client {results.client} · {results.created_at[:16].replace('T', ' ')}",
        [("", results)],
        ("p50", "p90", "p99"),
    )


def overlay_picture(named: Sequence[tuple[str, Results]]) -> str:
    """Return the picture of several sweeps on the same axes."""
    first = named[0][1]
    return _picture(
        f"{first.deployment.model}: ISL {first.workload.isl:,}, OSL {first.workload.osl:,}",
        " against ".join(f"{name} ({one.created_at[:10]})" for name, one in named),
        named,
        ("p50", "p90"),
    )


def _picture(
    title: str, subtitle: str, named: Sequence[tuple[str, Results]], percentiles: Sequence[str]
) -> str:
    levels = [level for _, results in named for level in results.levels]
    closed = all(level.load.concurrency is not None for level in levels)
    word = "concurrent requests" if closed else "requests per second"
    if any(not level.valid for level in levels):
        subtitle += " · hollow: more than 1 % of the requests went wrong"
    ticks = sorted({_load(level) for level in levels})
    charts = [
        Chart(
            title="Throughput per user against total throughput",
            x_title="tokens/s per user (median of 1 / ITL)",
            y_title="tokens/s in total",
            left=86,
            top=106,
            width=500,
            height=436,
            series=[
                Series(
                    name,
                    [
                        Point(user, level.tokens_per_s, level.load.in_words, not level.valid)
                        for level in results.levels
                        if (user := level.tokens_per_s_per_user.p50) is not None
                    ],
                    colour,
                )
                for (name, results), colour in zip(named, _COLOURS, strict=False)
            ],
        )
    ]
    for row, what in enumerate(("TTFT", "ITL")):
        series = []
        for (name, results), colour in zip(named, _COLOURS, strict=False):
            for number, key in enumerate(percentiles):
                own = colour if name else _COLOURS[number]
                points = [
                    Point(_load(level), value * 1e3, "", not level.valid)
                    for level in results.levels
                    if (value := getattr(_of(level, what), key)) is not None
                ]
                if points:
                    label = f"{name} {key}".strip()
                    series.append(Series(label, points, own, _MARKERS[key], _DASHES[key]))
        charts.append(
            Chart(
                title="Time to first token" if what == "TTFT" else "Inter-token latency",
                x_title=word,
                y_title=f"{what}, ms",
                left=690,
                top=106 + 258 * row,
                width=440,
                height=178,
                series=series,
                x_log=True,
                x_ticks=ticks,
                y_log=_spreads(series),
            )
        )
    return document(_WIDTH, _HEIGHT, title, subtitle, charts)


def _of(level: Level, what: str) -> Distribution:
    return level.ttft_s if what == "TTFT" else level.itl_s


def _spreads(series: Sequence[Series]) -> bool:
    """Return whether the small values would lie flat on the axis beside the large ones."""
    values = [point.y for one in series for point in one.points]
    return bool(values) and min(values) > 0 and max(values) > _WIDE_SPREAD * min(values)


def _load(level: Level) -> float:
    return float(level.load.concurrency or level.load.request_rate or 0.0)

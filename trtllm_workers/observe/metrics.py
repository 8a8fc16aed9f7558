"""Counting, and showing the counts to Prometheus. Knows names from the table, not their meaning.

::

    metrics = Metrics()
    events = metrics.counter("trtllm_launch_sse_events_total")   # once, at start
    events.add(1)                                                # hot path: one addition
    body, content_type = metrics.render(), CONTENT_TYPE

Counters, gauges and histograms belong to one event loop and take no lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import TypeVar

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from trtllm_workers.observe.metrics_table import TABLE, Kind, Spec
from trtllm_workers.types import EngineStats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_PREFIX = "trtllm_launch_"


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, n: float = 1) -> None:
        self.value += n

    def advance_to(self, total: float) -> None:
        """Take over a total that somebody else counts; a smaller one changes nothing."""
        if total > self.value:
            self.value = total


class Gauge:
    """A number that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def add(self, n: float = 1) -> None:
        self.value += n

    def set(self, value: float) -> None:
        self.value = value


class Histogram:
    """How often values fell into each bucket; a value equal to a bound belongs to it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


Series = Counter | Gauge | Histogram
_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class Metrics(Collector):
    """All metrics of one process. Asking twice for the same name and labels gives the same object.

    ``counter``, ``gauge`` and ``histogram`` raise KeyError for a name that is not in the table,
    TypeError for another kind or other labels: mistakes of ours, found at start.
    """

    def __init__(self, table: Iterable[Spec] = TABLE, *, process: bool = True) -> None:
        self._specs = {spec.name: spec for spec in table}
        self._series: dict[str, dict[tuple[str, ...], Series]] = {name: {} for name in self._specs}
        self._refreshers: list[Callable[[], None]] = []
        # Our own registry: the library's process-wide one stays as it is, and tests do not meet.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        if process:
            ProcessCollector(registry=self._registry)

    def counter(self, name: str, **labels: str) -> Counter:
        return self._get(name, "counter", labels, lambda _spec: Counter())

    def gauge(self, name: str, **labels: str) -> Gauge:
        return self._get(name, "gauge", labels, lambda _spec: Gauge())

    def histogram(self, name: str, **labels: str) -> Histogram:
        return self._get(name, "histogram", labels, lambda spec: Histogram(spec.buckets))

    def remove(self, name: str, **labels: str) -> None:
        """Forget the series of ``name`` that have these labels (all, if none are given)."""
        spec = self._specs[name]
        wanted = [(spec.labels.index(label), value) for label, value in labels.items()]
        series = self._series[name]
        for key in [key for key in series if all(key[at] == value for at, value in wanted)]:
            del series[key]

    def before_render(self, refresh: Callable[[], None]) -> None:
        """Call ``refresh`` before each ``render``: for gauges that are read, not kept."""
        self._refreshers.append(refresh)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format, of ``CONTENT_TYPE``."""
        for refresh in self._refreshers:
            refresh()
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Yield one family per metric of the table that has a series."""
        for name, series in self._series.items():
            if series:
                yield _family(self._specs[name], series)

    def _get(
        self, name: str, kind: Kind, labels: dict[str, str], make: Callable[[Spec], _Kind]
    ) -> _Kind:
        try:
            spec = self._specs[name]
        except KeyError:
            raise KeyError(f"{name} is not in observe/metrics_table.py") from None
        if spec.kind != kind:
            raise TypeError(f"{name} is a {spec.kind}, not a {kind}")
        if labels.keys() != set(spec.labels):
            raise TypeError(f"{name} has the labels {spec.labels}, not {tuple(labels)}")
        key = tuple(str(labels[label]) for label in spec.labels)
        found = self._series[name].get(key)
        if found is None:
            found = self._series[name][key] = make(spec)
        return found  # type: ignore[return-value]  # a name has one kind, checked above


def _family(spec: Spec, series: dict[tuple[str, ...], Series]) -> Metric:
    family: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
    if spec.kind == "histogram":
        family = HistogramMetricFamily(spec.name, spec.help, labels=spec.labels)
    elif spec.kind == "counter":
        family = CounterMetricFamily(spec.name, spec.help, labels=spec.labels)
    else:
        family = GaugeMetricFamily(spec.name, spec.help, labels=spec.labels)
    for labels, one in series.items():
        if isinstance(one, Histogram):
            assert isinstance(family, HistogramMetricFamily)
            family.add_metric(labels, _cumulative(one), one.total)
        else:
            assert not isinstance(family, HistogramMetricFamily)
            family.add_metric(labels, one.value)
    return family


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    running = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        running += count
        buckets.append((_bound_text(bound), running))
    return buckets


def _bound_text(bound: float) -> str:
    # As Prometheus writes it: 1.0 and 0.5, not 1.
    return "+Inf" if bound == float("inf") else repr(float(bound))


def record_engine_stats(metrics: Metrics, worker_id: str, stats: EngineStats) -> None:
    """Take over an engine's load and counters."""

    def gauge(what: str, value: float, **labels: str) -> None:
        metrics.gauge(f"{_PREFIX}engine_{what}", worker_id=worker_id, **labels).set(value)

    def counter(what: str, total: float) -> None:
        metrics.counter(f"{_PREFIX}engine_{what}", worker_id=worker_id).advance_to(total)

    gauge("running_requests", stats.num_running)
    gauge("waiting_requests", stats.num_waiting)
    gauge("blocks", stats.free_blocks, state="free")
    gauge("blocks", stats.cached_blocks, state="cached")
    gauge("blocks", stats.active_blocks, state="active")
    counter("steps_total", stats.num_steps)
    counter("preemptions_total", stats.preemptions)

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from trtllm_workers.observe.metrics import (
    CONTENT_TYPE,
    Histogram,
    Metrics,
    record_engine_stats,
)
from trtllm_workers.observe.metrics_table import TABLE, Spec
from trtllm_workers.types import EngineStats

UNITS = "total|seconds|bytes|tokens|blocks|images|items|requests|workers|pairs|ratio|gigabytes_per_second"


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


@pytest.mark.parametrize("spec", TABLE, ids=lambda spec: spec.name)
def test_every_metric_is_named_what_and_unit_and_has_help(spec: Spec) -> None:
    assert re.fullmatch(rf"trtllm_launch_[a-z]+(_[a-z]+)*_({UNITS})", spec.name)
    assert (spec.kind == "counter") == spec.name.endswith("_total")
    assert spec.help.endswith(".")
    assert len(spec.help) > 10
    assert (spec.kind == "histogram") == bool(spec.buckets)
    assert list(spec.buckets) == sorted(set(spec.buckets))


def test_names_are_unique() -> None:
    assert len({spec.name for spec in TABLE}) == len(TABLE)


def test_every_metric_can_be_made_and_is_shown() -> None:
    metrics = Metrics(process=False)
    for spec in TABLE:
        labels = dict.fromkeys(spec.labels, "x")
        if spec.kind == "counter":
            metrics.counter(spec.name, **labels).add(2)
        elif spec.kind == "gauge":
            metrics.gauge(spec.name, **labels).set(2)
        else:
            metrics.histogram(spec.name, **labels).observe(2)
    shown = {name.removesuffix("_sum") for (name, _), value in samples(metrics).items() if value}
    assert {spec.name for spec in TABLE} <= shown


def test_asking_twice_gives_the_same_object() -> None:
    metrics = Metrics(process=False)
    name = "trtllm_launch_prompt_tokens_total"
    metrics.counter(name, model="a").add()
    metrics.counter(name, model="a").add(2)
    metrics.counter(name, model="b").add(5)
    assert samples(metrics) == {
        (name, (("model", "a"),)): 3,
        (name, (("model", "b"),)): 5,
    }


def test_label_values_are_escaped() -> None:
    metrics = Metrics(process=False)
    awkward = 'say "hi"\nback\\slash'
    metrics.counter("trtllm_launch_prompt_tokens_total", model=awkward).add()
    assert ("trtllm_launch_prompt_tokens_total", (("model", awkward),)) in samples(metrics)


def test_a_name_outside_the_table_is_refused_at_creation() -> None:
    with pytest.raises(KeyError, match="made_up is not in"):
        Metrics(process=False).counter("made_up")


def test_another_kind_or_other_labels_are_refused_at_creation() -> None:
    metrics = Metrics(process=False)
    with pytest.raises(TypeError, match="is a counter, not a gauge"):
        metrics.gauge("trtllm_launch_sse_events_total")
    with pytest.raises(TypeError, match="has the labels"):
        metrics.counter("trtllm_launch_prompt_tokens_total")
    with pytest.raises(TypeError, match="has the labels"):
        metrics.counter("trtllm_launch_sse_events_total", model="x")


@given(st.lists(st.floats(0, 20), max_size=50))
def test_a_histogram_counts_each_value_in_the_buckets_that_hold_it(values: list[float]) -> None:
    bounds = (0.5, 1.0, 5.0, 10.0)
    spec = Spec("trtllm_launch_x_seconds", "histogram", (), "For this test.", bounds)
    metrics = Metrics([spec], process=False)
    histogram = metrics.histogram(spec.name)
    for value in values:
        histogram.observe(value)
    shown = samples(metrics)
    for bound in bounds:
        label = (("le", str(bound)),)
        assert shown[f"{spec.name}_bucket", label] == sum(value <= bound for value in values)
    assert shown[f"{spec.name}_bucket", (("le", "+Inf"),)] == len(values)
    assert shown[f"{spec.name}_count", ()] == len(values)
    assert shown[f"{spec.name}_sum", ()] == pytest.approx(sum(values))


def test_a_value_on_a_bound_belongs_to_it() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0)
    assert histogram.counts == [1, 0, 0]


def test_engine_stats_are_taken_over_and_counters_never_fall() -> None:
    metrics = Metrics(process=False)
    record_engine_stats(metrics, "w", EngineStats(num_running=3, free_blocks=7, num_steps=9))
    record_engine_stats(metrics, "w", EngineStats(num_running=1, free_blocks=8, num_steps=4))
    shown = samples(metrics)
    worker = ("worker_id", "w")
    assert shown["trtllm_launch_engine_running_requests", (worker,)] == 1
    assert shown["trtllm_launch_engine_blocks", (("state", "free"), worker)] == 8
    assert shown["trtllm_launch_engine_steps_total", (worker,)] == 9


def test_removed_series_are_no_longer_shown() -> None:
    metrics = Metrics(process=False)
    name = "trtllm_launch_registered_workers"
    metrics.gauge(name, model="a", role="aggregated", state="ready").set(1)
    metrics.gauge(name, model="b", role="aggregated", state="ready").set(1)
    metrics.remove(name, model="a")
    assert [dict(labels)["model"] for _, labels in samples(metrics)] == ["b"]
    metrics.remove(name)
    assert samples(metrics) == {}


def test_gauges_can_be_refreshed_before_each_render() -> None:
    metrics = Metrics(process=False)
    gauge = metrics.gauge("trtllm_launch_in_flight_requests", model="m")
    metrics.before_render(lambda: gauge.add(1))
    metrics.render()
    assert b"} 2.0" in metrics.render()


def test_process_figures_are_shown_and_the_process_wide_registry_is_left_alone() -> None:
    before = set(REGISTRY._names_to_collectors)
    shown = {name for name, _ in samples(Metrics())}
    assert "process_cpu_seconds_total" in shown
    assert "process_resident_memory_bytes" in shown
    assert set(REGISTRY._names_to_collectors) == before


def test_the_content_type_is_the_one_every_prometheus_reads() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")

from __future__ import annotations

from typing import Any

import pytest

from trtllm_workers.bench.deployment import (
    Real,
    Stated,
    contradictions,
    phase_means,
    phases_of,
    read_deployment,
)


def worker(role: str, ranks: int = 1, state: str = "ready") -> dict[str, Any]:
    return {
        "role": role,
        "state": state,
        "engine": "sim",
        "device": "cpu",
        "kv_transport": "ucx",
        "tensor_parallel_size": ranks,
    }


def real(*workers: dict[str, Any]) -> Real:
    health = {"models": {"m": {"workers": list(workers), "adapters": {"lora": {}}}}}
    return read_deployment("m", 4096, health, {"mode": "kv"})


def test_workers_are_counted_by_role() -> None:
    told = real(
        worker("prefill", 2), worker("decode"), worker("decode"), worker("decode", 1, "lost")
    )
    assert told.mode == "disaggregated"
    assert told.num_workers == {"prefill": 1, "decode": 2}
    assert told.tensor_parallel_size == {"prefill": 2, "decode": 1}
    assert told.router_mode == "kv"
    assert "1 prefill worker of 2 ranks, 2 decode workers, engine sim on cpu" in told.in_words


def test_an_adapter_is_served_by_its_models_workers() -> None:
    health = {"models": {"m": {"workers": [worker("aggregated")], "adapters": {"lora": {}}}}}
    assert read_deployment("lora", None, health, None).mode == "aggregated"


@pytest.mark.parametrize(
    "health", [None, {}, {"status": "ok"}, {"models": {"other": {}}}, [], "up"]
)
def test_another_server_tells_only_its_model(health: object) -> None:
    told = read_deployment("m", None, health, None)
    assert told.mode is None
    assert contradictions(Stated(mode="disaggregated", tp=8), told) == []


def test_what_is_stated_rightly_is_not_contradicted() -> None:
    told = real(worker("aggregated", 2), worker("aggregated", 2))
    assert contradictions(Stated(mode="aggregated", tp=2, dp=2), told) == []
    assert contradictions(Stated(), told) == []


def test_every_contradiction_says_both_values() -> None:
    told = real(worker("prefill"), worker("decode", 2))
    stated = Stated(mode="aggregated", tp=4, prefill_tp=1, prefill_dp=3, decode_tp=1, decode_dp=1)
    assert contradictions(stated, told) == [
        "--mode says aggregated, the server is disaggregated",
        "--tp says 4, the server has no aggregated workers",
        "--prefill-dp says 3 workers (prefill), the server has 1",
        "--decode-tp says 1 ranks in each worker (decode), the server has 2",
    ]


def test_a_size_the_engine_does_not_tell_contradicts_nothing() -> None:
    told = real(worker("aggregated", 0))
    assert contradictions(Stated(tp=8), told) == []


METRICS = """# HELP x y
trtllm_launch_first_token_phase_seconds_bucket{le="1.0",model="m",phase="queue"} 7.0
trtllm_launch_first_token_phase_seconds_sum{model="m",phase="queue"} 1.5
trtllm_launch_first_token_phase_seconds_count{model="m",phase="queue"} 10.0
trtllm_launch_first_token_phase_seconds_sum{model="n",phase="queue"} 0.5
trtllm_launch_first_token_phase_seconds_count{model="n",phase="queue"} 10.0
trtllm_launch_time_to_first_token_seconds_sum{model="m"} 4
trtllm_launch_time_to_first_token_seconds_count{model="m"} 8
"""


def test_phases_are_means_between_two_readings() -> None:
    after = phases_of(METRICS)
    assert after == {"queue": (2.0, 20.0), "ingress": (4.0, 8.0)}
    means = phase_means({"queue": (1.0, 10.0), "ingress": (4.0, 8.0)}, after)
    assert means == {"queue": pytest.approx(0.1)}

"""Settings to plans and commands: pure, so every case is a value."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import make_settings
from trtllm_workers.deploy.commands import as_shell
from trtllm_workers.deploy.inventory import visible_gpus
from trtllm_workers.deploy.plan import Inventory, Plan, make_plan
from trtllm_workers.deploy.run import RunFolder

AWKWARD = ["a model", "it's", 'say "hi"', "a;b", "$HOME", "new\nline", "-dash", "日本"]
INVENTORY = Inventory(python="/venv/bin/python", cwd=Path("/home/me"), num_cpus=8)


def plan_of(inventory: Inventory = INVENTORY, **settings: Any) -> Plan:
    return make_plan(make_settings(**settings), inventory, RunFolder(Path("/runs/abc123")))


def test_shell_text_matches_its_golden_file(golden: Callable[[str, str], None]) -> None:
    plan = plan_of(
        model_path=Path("/models/my model"),
        engine="sim",
        http_port=9000,
        num_workers=2,
        overrides=["kv_cache_config.max_tokens=4096", "max_batch_size=8"],
        drain_timeout_s=2.5,
        cluster_secret="correct horse battery staple",
        log_dir=Path("/var/log/llm"),
    )
    golden("plan_agg.txt", as_shell(plan))


def test_secret_is_in_no_command() -> None:
    plan = plan_of(cluster_secret="correct horse battery staple")
    assert "correct horse" not in as_shell(plan)
    assert "correct horse" not in json.dumps([[*one.argv, *one.env] for one in plan.processes])


@pytest.mark.parametrize("name", AWKWARD)
def test_shell_text_gives_a_shell_the_words_of_the_plan(name: str, tmp_path: Path) -> None:
    """Run the printed text with an interpreter that writes down what it was called with."""
    fake = tmp_path / "py thon"
    fake.write_text('#!/bin/bash\nprintf "%s\\0" "$0" "$@" >> "$(dirname "$0")/calls"\n')
    fake.chmod(0o755)
    inventory = Inventory(python=str(fake), cwd=tmp_path)
    folder = RunFolder(tmp_path / "abc123")
    settings = make_settings(served_model_name=name, model_path=tmp_path / name)
    plan = make_plan(settings, inventory, folder)
    done = subprocess.run(
        ["bash", "-euc", as_shell(plan)], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "calls").read_bytes().decode().split("\0")[:-1]
    assert words == [word for process in plan.processes for word in process.argv]


def test_value_that_looks_like_a_flag_is_joined_to_its_flag() -> None:
    plan = plan_of(served_model_name="--version")
    assert "--served-model-name=--version" in plan.processes[0].argv


def test_processes_share_one_discovery_and_have_their_own_files() -> None:
    plan = plan_of(num_workers=2)
    assert [process.name for process in plan.processes] == ["worker-0", "worker-1", "ingress"]
    for process in plan.processes:
        at = process.argv.index("--discovery")
        assert process.argv[at + 1] == "file:///runs/abc123/discovery"
        assert process.log == Path(f"/runs/abc123/logs/{process.name}.log")
        assert process.argv[-1] == f"/runs/abc123/status/{process.name}.json"
        assert process.cwd == Path("/home/me")


def test_workers_of_a_shared_discovery_have_names_of_their_run() -> None:
    plan = plan_of(discovery="file:///shared")
    assert plan.processes[0].argv[plan.processes[0].argv.index("--worker-id") + 1] == (
        "abc123-worker-0"
    )


def test_log_dir_that_outlives_runs_gets_files_of_the_run() -> None:
    plan = plan_of(log_dir=Path("/var/log/llm"))
    assert plan.processes[0].log == Path("/var/log/llm/abc123-worker-0.log")
    assert plan.keeps_logs


def shares_of(name: str, plan: Plan) -> list[str | None]:
    return [one.env.get(name) for one in plan.processes if one.role != "ingress"]


def test_workers_share_the_cpus() -> None:
    assert shares_of("OMP_NUM_THREADS", plan_of(num_workers=1)) == [None]
    assert shares_of("OMP_NUM_THREADS", plan_of(num_workers=3)) == ["2", "2", "2"]
    assert shares_of("OMP_NUM_THREADS", plan_of(num_workers=3, engine="sim")) == [None] * 3


def test_workers_get_a_gpu_each() -> None:
    two = Inventory(python="python", cwd=Path("/"), gpus=("0", "1"))
    assert shares_of("CUDA_VISIBLE_DEVICES", plan_of(two, num_workers=2)) == ["0", "1"]
    crowded = plan_of(two, num_workers=3)
    assert shares_of("CUDA_VISIBLE_DEVICES", crowded) == ["0", "1", "0"]
    assert "3 workers share 2 GPUs" in crowded.notes[0]


def test_threads_that_the_operator_set_are_left_alone() -> None:
    inventory = Inventory(python="python", cwd=Path("/"), preset=frozenset({"OMP_NUM_THREADS"}))
    assert shares_of("OMP_NUM_THREADS", plan_of(inventory, num_workers=2)) == [None, None]


@pytest.mark.parametrize(
    ("value", "gpus"),
    [("2,3", ("2", "3")), ("GPU-a, GPU-b", ("GPU-a", "GPU-b")), ("", ()), ("0,-1,1", ("0",))],
)
def test_devices_that_the_operator_left_visible_are_shared_out(
    value: str, gpus: tuple[str, ...]
) -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == gpus


def test_one_worker_alone_sees_what_the_launcher_sees() -> None:
    two = Inventory(python="python", cwd=Path("/"), gpus=("2", "3"))
    assert shares_of("CUDA_VISIBLE_DEVICES", plan_of(two, num_workers=1)) == [None]

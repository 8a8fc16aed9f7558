"""Commands of TensorRT-LLM workers through stand-ins for mpirun, srun and trtllm-llmapi-launch.

The stand-ins do to words and variables what the real programs do: srun starts tasks, the launch script
splits its arguments on white space, expands patterns and clears MPI's and UCX's variables on rank 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import make_settings
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.deploy.plan import Inventory, PlannedProcess, make_plan
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.types import Role

SRUN = """#!/bin/bash
set -eu
for word in "$@"; do case "$word" in
  --ntasks=*) tasks="${word#*=}" ;;
esac; done
printf '%s\\n' "$@" > "$CALLS/srun"
while [[ "$1" == --* ]]; do shift; done
for ((rank = 0; rank < tasks; rank++)); do
  SLURM_PROCID=$rank SLURM_NTASKS=$tasks PMIX_RANK=$rank "$@"
done
"""
# With its own stdout for each rank's fate; splitting is the point of this stand-in.
LLMAPI_LAUNCH = """#!/bin/bash
set -e
task_with_command="${@:1}"
if [ "$SLURM_PROCID" -eq 0 ]; then
  for name in $(compgen -e); do
    case "$name" in OMPI_*|PMIX_*|PMI_*|SLURM_*|MPI_*|UCX_*) unset "$name" ;; esac
  done
  $task_with_command
else
  echo "rank $SLURM_PROCID waits" >> "$CALLS/others"
fi
"""
MPIRUN = """#!/bin/bash
set -eu
printf '%s\\n' "$@" > "$CALLS/mpirun"
names=()
while [[ "$1" == -* ]]; do
  case "$1" in
    -n) ranks="$2"; shift ;;
    -x) [[ -v "$2" ]] || { echo "no variable $2" >&2; exit 1; }; shift ;;
    --bind-to) shift ;;
  esac
  shift
done
for ((rank = 0; rank < ranks; rank++)); do
  OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_SIZE=$ranks "$@"
done
"""
# In the interpreter's place: what a worker would be told, after it has done what the worker does first.
PROBE = f"""#!{sys.executable}
import json, os, sys
from trtllm_workers.config.env import apply_rank_environment, arguments, mpi_rank
environ = apply_rank_environment()
words = sys.argv[sys.argv.index("worker") + 1:]
seen = {{"words": arguments(words, environ), "env": environ}}
path = os.path.join(environ["CALLS"], f"rank{{mpi_rank(environ)}}.json")
with open(path, "w") as file:
    json.dump(seen, file)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {"srun": SRUN, "trtllm-llmapi-launch": LLMAPI_LAUNCH, "mpirun": MPIRUN, "python": PROBE}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def worker_of(programs: Path, tp: int, environ: dict[str, str], **changes: Any) -> PlannedProcess:
    inventory = Inventory(
        python=str(programs / "python"),
        cwd=programs.parent,
        gpus=("0", "1"),
        mpirun=str(programs / "mpirun"),
        mpi_flavour="openmpi",
        in_slurm_job=True,
        host_env=environ,
        hostname="head",
        is_root=False,
    )
    settings = make_settings(engine="trtllm", **changes)
    sizes = EngineConfig("trtllm", {"tensor_parallel_size": Setting(tp, "a.yaml:1")})
    folder = RunFolder(programs.parent / "abc123")
    return make_plan(settings, inventory, folder, {Role.AGGREGATED: sizes}).processes[0]


def ranks_of(
    programs: Path, worker: PlannedProcess, environ: dict[str, str]
) -> dict[int, dict[str, Any]]:
    """Start a planned worker as the supervisor does; return what each rank's command was told."""
    calls = programs.parent / "calls"
    calls.mkdir()
    kept = {name: value for name, value in environ.items() if name not in worker.unset}
    done = subprocess.run(
        worker.argv,
        env={**kept, **worker.env, "CALLS": str(calls)},
        cwd=worker.cwd,
        capture_output=True,
        text=True,
        timeout=25,
    )
    assert done.returncode == 0, done.stderr
    return {
        int(path.stem.removeprefix("rank")): json.loads(path.read_text())
        for path in calls.glob("rank*.json")
    }


def host_env(programs: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{programs}:{os.environ['PATH']}", **more}


def words_after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("model", ["/models/a model", "/models/*", "/models/plain", "/m/new\nline"])
def test_words_and_variables_survive_srun_and_the_launch_script(programs: Path, model: str) -> None:
    environ = host_env(programs, UCX_TLS="rc,cuda_copy", SLURM_JOB_ID="7", HF_TOKEN="hf_abc")
    worker = worker_of(programs, 4, environ, model_path=Path(model))
    ranks = ranks_of(programs, worker, environ)
    assert list(ranks) == [0], "the launch script keeps the other ranks"
    assert words_after(ranks[0]["words"], "--model-path") == model
    assert words_after(ranks[0]["words"], "--status-file") == str(worker.status)
    seen = ranks[0]["env"]
    assert "SLURM_JOB_ID" not in seen
    assert seen["UCX_TLS"] == "rc,cuda_copy"
    assert seen["HF_TOKEN"] == "hf_abc"
    assert seen["TRTLLM_EPLB_SHM_NAME"] == "trtllm_launch_abc123_worker-0"
    calls = programs.parent / "calls"
    assert (calls / "others").read_text().count("waits") == 3
    assert "--nodes=2" in (calls / "srun").read_text().splitlines()


@pytest.mark.parametrize("model", ["/models/a model", "/models/*"])
def test_words_and_variables_reach_every_rank_of_mpirun(programs: Path, model: str) -> None:
    environ = host_env(programs, UCX_TLS="rc", SLURM_JOB_ID="7", PMIX_RANK="0")
    worker = worker_of(programs, 2, environ, model_path=Path(model))
    ranks = ranks_of(programs, worker, environ)
    assert sorted(ranks) == [0, 1]
    for seen in ranks.values():
        assert words_after(seen["words"], "--model-path") == model
        assert seen["env"]["UCX_TLS"] == "rc"
        assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert seen["env"]["TRTLLM_LAUNCH_WORLD_SIZE"] == "2"
        assert not {"SLURM_JOB_ID", "PMIX_RANK"} & set(seen["env"])


def test_worker_takes_its_arguments_from_the_variable() -> None:
    told = {"TRTLLM_LAUNCH_ARGUMENTS": json.dumps(["--engine", "no such engine"])}
    done = worker_command("--arguments-from-environment", **told)
    assert done.returncode == 2
    assert "no such engine" in done.stderr


@pytest.mark.parametrize("value", [None, "not JSON"])
def test_missing_or_broken_variable_is_told_by_name(value: str | None) -> None:
    told = {} if value is None else {"TRTLLM_LAUNCH_ARGUMENTS": value}
    done = worker_command("--arguments-from-environment", **told)
    assert done.returncode == 2
    assert "needs the environment variable TRTLLM_LAUNCH_ARGUMENTS" in done.stderr
    assert "Traceback" not in done.stderr


def worker_command(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", "worker", *words],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=25,
    )

"""Engine trtllm in a SLURM job, TensorRT-LLM itself being the stand-in of ``tests/fakes/trtllm``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import MiniCluster
from tests.slurm.driver import ROOT, Driver, completion, left_on, started

FAKES = ROOT / "tests/fakes/trtllm"
PROMPT = "What is a handoff?"
SMALL = ("--set", "max_num_tokens=512", "--set", "max_batch_size=16", "--lint", "off")
GPU = "--gpus-per-node=1"
FREE = ("--http-port", "0")


@pytest.fixture
def stand_in() -> dict[str, str]:
    beside = Path(sys.executable).parent  # MPICH's mpirun, which the ranks' mpi4py belongs to
    return {
        "ENGINE": "trtllm",
        "PATH": f"{FAKES / 'bin'}:{beside}:{os.environ['PATH']}",
        "PYTHONPATH": str(FAKES),
        "FAKE_TRTLLM_PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "0",
        "NUM_GPUS_PER_NODE": "1",
        # What a shell has set for TensorRT-LLM must reach every rank, spaces and quotes included.
        "TRTLLM_OPERATORS_OWN": "two words, \"quoted\" and 'so'",
    }


def records(driver: Driver, part: str) -> list[dict[str, object]]:
    return [
        json.loads(path.read_text()) for path in sorted(driver.runs.glob(f"*/ranks/{part}.*.json"))
    ]


def test_one_worker_over_two_nodes_starts_through_trtllm_llmapi_launch(
    mini_cluster: MiniCluster, tmp_path: Path, stand_in: dict[str, str]
) -> None:
    runs = tmp_path / "runs with a space"
    words = ("multinode/srun_aggregated.sh", *FREE, *SMALL, "--set", "tensor_parallel_size=2")
    environ = {
        **stand_in,
        "NUM_NODES": "2",
        "MODEL_PATH": str(ROOT / "trtllm_workers/demo/model"),
        "SERVED_MODEL_NAME": "demo",
        "ENGINE_CONFIG": str(ROOT / "engine_configs/agg.yaml"),
        "UCX_TLS": "all",
    }
    with started(mini_cluster, runs, GPU, *words, nodes=2, **environ) as driver:
        url = driver.url()
        answer = completion(url, PROMPT)
        assert "handoff" in answer
        ranks = records(driver, "worker-0")
        assert len({one["node"] for one in ranks}) == 2
        assert len({one["digest"] for one in ranks}) == 1
        for one in ranks:
            variables = one["variables"]
            assert isinstance(variables, dict)
            assert variables["TRTLLM_OPERATORS_OWN"] == environ["TRTLLM_OPERATORS_OWN"]
            assert variables["UCX_TLS"] == "all"
        assert driver.interrupt() == 130
    assert left_on(mini_cluster, mini_cluster.nodes) == []

"""``slurm``: the whole text of plans and scripts, what is passed on, and what must not be in it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.test_cli_help import help_of
from trtllm_workers.cli.slurm import VERBS
from trtllm_workers.config.slurm_options import SLURM_OPTIONS

ROOT = Path(__file__).resolve().parents[3]
Golden = Callable[[str, str], None]


def plan(tmp_path: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "trtllm_workers.cli.main", "slurm", "plan", *words],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environ},
    )


def settled(text: str, tmp_path: Path) -> str:
    """Return a plan without what differs from machine to machine and run to run."""
    run_id = re.search(r"# run ([0-9a-f]{6}):", text)
    assert run_id is not None
    for found, instead in (
        (run_id[1], "RUN_ID"),
        (sys.executable, "PYTHON"),
        (str(tmp_path), "HOME"),
        (str(ROOT), "CHECKOUT"),
    ):
        text = text.replace(found, instead)
    return text


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_matches_its_golden_file(verb: str, golden: Golden) -> None:
    golden(f"help_slurm_{verb}.txt", help_of("slurm", verb))


def test_every_option_of_a_job_is_in_its_help_with_its_variables() -> None:
    shown = " ".join(help_of("slurm", "run").split())
    for option in SLURM_OPTIONS:
        assert str(option.flag) in shown
        for variable in option.env:
            assert variable in shown


def test_plan_of_a_disaggregated_job_on_cpus(tmp_path: Path, golden: Golden) -> None:
    done = plan(
        tmp_path,
        *("--engine", "torch", "--disaggregated", "--num-prefill-workers", "2"),
        *("--num-decode-nodes", "2", "--set", "tensor_parallel_size=2"),
        *("--services", "etcd", "--mpi", "pmi2"),
    )
    assert done.returncode == 0, done.stderr
    golden("slurm_plan_torch.txt", settled(done.stdout, tmp_path))


def test_encode_workers_are_refused_by_name(tmp_path: Path) -> None:
    model = tmp_path / "vl"
    model.mkdir()
    (model / "config.json").write_text('{"vision_config": {}}')
    done = plan(tmp_path, "--engine", "torch", "--num-encode-workers", "1", MODEL_PATH=str(model))
    assert done.returncode == 2
    assert done.stderr.startswith(
        "trtllm-launch: --num-encode-workers: a job on SLURM starts no encode workers; without them"
    )


def test_plan_of_wide_expert_parallelism_in_containers(tmp_path: Path, golden: Golden) -> None:
    configs = ROOT / "engine_configs/deepseek_r1/wide_ep"
    model = tmp_path / "models" / "DeepSeek R1"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    done = plan(
        tmp_path,
        "--disaggregated",
        MODEL_PATH=str(model),
        SERVED_MODEL_NAME="deepseek-r1",
        IMAGE="registry#team/trtllm launch:1",
        MOUNTS="/scratch:/scratch",
        NUM_GPUS_PER_NODE="4",
        NUM_PREFILL_NODES="4",
        NUM_DECODE_NODES="4",
        PREFILL_ENGINE_CONFIG=str(configs / "wide_ep_prefill.yaml"),
        DECODE_ENGINE_CONFIG=str(configs / "wide_ep_decode.yaml"),
        ACCOUNT="team",
        PARTITION="gb200",
        TIME_LIMIT="04:00:00",
        SBATCH_ARGS="--segment=8 --comment='two words'",
        NCCL_DEBUG="WARN",
        LINT="off",
    )
    assert done.returncode == 0, done.stderr
    golden("slurm_plan_wide_ep.txt", settled(done.stdout, tmp_path))


def test_no_secret_is_in_a_plan_or_a_script(tmp_path: Path) -> None:
    secrets = {
        "CLUSTER_SECRET": "planted-secret-0123456789",
        "HF_TOKEN": "hf_planted",
        "NATS_TOKEN": "planted-nats",
        "ETCD_PASSWORD": "planted-etcd",
        "NCCL_API_KEY": "planted-key",
    }
    done = plan(tmp_path, "--engine", "torch", "--etcd-username", "me", **secrets)
    for value in secrets.values():
        assert value not in done.stdout + done.stderr


def test_values_with_spaces_and_quotes_come_back_from_the_script(tmp_path: Path) -> None:
    name = """a "model's" name, $HOME `x` \\ and *"""
    done = plan(
        tmp_path, "--engine", "torch", "--served-model-name", name, UCX_NET_DEVICES="eth 0 'x'"
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("exec "))
    words = shlex.split(line)
    assert words[words.index("--served-model-name") + 1] == name
    assert "UCX_NET_DEVICES=eth 0 'x'" in words


def test_a_plan_for_a_thousand_nodes_takes_less_than_a_second(tmp_path: Path) -> None:
    words = ("--engine", "torch", "--num-workers", "250", "--num-nodes", "4", "--mpi", "pmi2")
    fastest = 99.0
    for _ in range(3):
        began = time.perf_counter()
        done = plan(tmp_path, *words, "--set", "tensor_parallel_size=4")
        fastest = min(fastest, time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        if fastest < 1.0:
            break
    assert "= 1000 nodes" in done.stdout
    assert done.stdout.count("\nsrun ") == 252
    assert fastest < 1.0


@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        (("--num-nodes", "0"), {}, "--num-nodes: must be 1 to 4096, not 0"),
        ((), {"NUM_DECODE_NODES": "two"}, "environment NUM_DECODE_NODES: must be a whole number"),
        (("--srun-args", "'open"), {}, "--srun-args: No closing quotation"),
        ((), {"JOB_NAME": "two\nlines"}, "environment JOB_NAME: must be one line"),
        (("--sbatch-args", "--nodes=9"), {}, "--nodes is given twice"),
        (("--services", "consul"), {}, "--services: must be one of folder, etcd"),
        (("--num-node", "2"), {}, "did you mean --num-nodes?"),
    ],
)
def test_what_is_wrong_is_told_with_its_source(
    tmp_path: Path, words: tuple[str, ...], environ: dict[str, str], told: str
) -> None:
    done = plan(tmp_path, "--engine", "torch", *words, **environ)
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_gpus_mean_trtllm_although_this_host_has_none(tmp_path: Path) -> None:
    done = plan(tmp_path, NUM_GPUS_PER_NODE="1", LINT="off")
    assert "--engine trtllm" in done.stdout
    assert "--engine torch" in plan(tmp_path).stdout


def test_unknown_verbs_name_the_nearest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", "slurm", "statsu"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert "did you mean 'status'?" in done.stderr

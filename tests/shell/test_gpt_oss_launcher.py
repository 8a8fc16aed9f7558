"""launch/gpt_oss_disagg.sh with the real command: its defaults, and that what is set already wins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "gpt_oss_disagg.sh"
CONFIGS = ROOT / "engine_configs" / "gpt_oss"
FAKE = """#!/bin/bash
env -0 > "$CALLS"
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "gpt oss"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCHER), *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={
            "PATH": os.environ["PATH"],
            "TRTLLM_LAUNCH_VENV": str(Path(sys.executable).parents[1]),
            "KV_TRANSPORT": "tcp",
            **env,
        },
    )


def dry_run(model: Path, tmp_path: Path, *words: str, **env: str) -> str:
    """Return what would be started. Engine torch cuts a model over GPUs too, and shows which."""
    done = run(
        "--dry-run",
        *words,
        **{"MODEL_PATH": str(model), "ENGINE": "torch", "RUN_DIR": str(tmp_path / "runs"), **env},
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs").exists()
    return done.stdout


def variables(tmp_path: Path, **env: str) -> dict[str, str]:
    """Return the environment that the command gets, from a fake one that only notes it."""
    fake = tmp_path / "venv" / "bin" / "trtllm-launch"
    fake.parent.mkdir(parents=True)
    fake.write_text(FAKE)
    fake.chmod(0o755)
    done = run(CALLS=str(tmp_path / "calls"), TRTLLM_LAUNCH_VENV=str(tmp_path / "venv"), **env)
    assert done.returncode == 0, done.stderr
    pairs = (tmp_path / "calls").read_bytes().decode().split("\0")[:-1]
    return dict(pair.split("=", 1) for pair in pairs)


def test_defaults_are_the_model_its_name_its_configs_and_eight_gpus(tmp_path: Path) -> None:
    given = variables(tmp_path)
    expected = {
        "MODEL_PATH": "/model",
        "SERVED_MODEL_NAME": "openai/gpt-oss-120b",
        "DISAGGREGATION_STRATEGY": "prefill_first",
        "PREFILL_ENGINE_ARGS": str(CONFIGS / "prefill.yaml"),
        "DECODE_ENGINE_ARGS": str(CONFIGS / "decode.yaml"),
        "PREFILL_CUDA_VISIBLE_DEVICES": "0,1,2,3",
        "DECODE_CUDA_VISIBLE_DEVICES": "4,5,6,7",
        "START_TIMEOUT_S": "1800",
        "TRTLLM_ENABLE_PDL": "1",
        "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL": "True",
    }
    assert {name: given.get(name) for name in expected} == expected


@pytest.mark.parametrize("value", ["a model", "it's", 'say "hi"', "a;b", "$HOME", "new\nline", "*"])
@pytest.mark.parametrize(
    "name",
    [
        "MODEL_PATH",
        "SERVED_MODEL_NAME",
        "DISAGGREGATION_STRATEGY",
        "PREFILL_ENGINE_ARGS",
        "DECODE_ENGINE_ARGS",
        "PREFILL_CUDA_VISIBLE_DEVICES",
        "DECODE_CUDA_VISIBLE_DEVICES",
        "START_TIMEOUT_S",
        "TRTLLM_ENABLE_PDL",
        "TRT_LLM_DISABLE_LOAD_WEIGHTS_IN_PARALLEL",
    ],
)
def test_what_is_set_already_wins_unchanged(tmp_path: Path, name: str, value: str) -> None:
    assert variables(tmp_path, **{name: value})[name] == value


def test_dry_run_gives_each_role_its_config_and_four_gpus(model: Path, tmp_path: Path) -> None:
    shown = dry_run(model, tmp_path)
    assert "1 prefill worker and 1 decode worker for model openai/gpt-oss-120b" in shown
    assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", shown) == ["0,1,2,3", "4,5,6,7"]
    assert re.findall(r"mpiexec .* -n (\d+) ", shown) == ["4", "4"]
    assert re.findall(r"--engine-config \S*/gpt_oss/(\S+)", shown) == [
        "prefill.yaml",
        "decode.yaml",
    ]
    assert "--strategy prefill_first" in shown


def test_a_flag_wins_over_the_launchers_defaults(model: Path, tmp_path: Path) -> None:
    shown = dry_run(
        model,
        tmp_path,
        *("--strategy", "decode_first", "--served-model-name", "mine"),
        *("--decode-cuda-visible-devices", "8,9,10,11"),
    )
    assert "--strategy decode_first" in shown
    assert "for model mine" in shown
    assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", shown) == ["0,1,2,3", "8,9,10,11"]


def test_too_few_gpus_are_refused_before_anything_starts(model: Path, tmp_path: Path) -> None:
    done = run(
        "--dry-run",
        MODEL_PATH=str(model),
        ENGINE="torch",
        DECODE_CUDA_VISIBLE_DEVICES="4,5",
        RUN_DIR=str(tmp_path / "runs"),
    )
    assert done.returncode == 2
    assert "tensor_parallel_size 4 needs 4 GPUs for each decode worker" in done.stderr


def test_the_configs_can_be_rehearsed_without_a_gpu(model: Path, tmp_path: Path) -> None:
    shown = dry_run(model, tmp_path, ENGINE="sim")
    assert shown.count("--engine sim") == 2
    assert "mpiexec" not in shown
    assert re.findall(r"--engine-config \S*/gpt_oss/(\S+)", shown) == [
        "prefill.yaml",
        "decode.yaml",
    ]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    done = run("--dry-run", ENGINE="torch", MODEL_PATH=str(gone))
    assert done.returncode == 2
    assert str(gone) in done.stderr

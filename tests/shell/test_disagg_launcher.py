"""launch/disagg.sh with the real command: what its variables do, and what it says when they are wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "disagg.sh"
# The command's own interpreter; pytest may run under another of its names.
PYTHON = re.compile(re.escape(str(Path(sys.executable).parent)) + r"/python[\d.]*")
AWKWARD = ["a model", "it's", 'say "hi"', "a;b", "$HOME", "new\nline", "*", "-n"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def run(model: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LAUNCHER), *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={
            "PATH": os.environ["PATH"],
            "TRTLLM_LAUNCH_VENV": str(Path(sys.executable).parents[1]),
            "MODEL_PATH": str(model),
            "ENGINE": "sim",
            "KV_TRANSPORT": "tcp",
            **env,
        },
    )


def dry_run(model: Path, *words: str, **env: str) -> str:
    done = run(model, "--dry-run", *words, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dry_run_matches_its_golden_file(
    model: Path, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    shown = dry_run(model, RUN_DIR=str(tmp_path / "runs"))
    run_id = re.findall(r"# run ([0-9a-f]{6}):", shown)[0]
    shown = PYTHON.sub("/venv/bin/python", shown)
    for found, name in (
        (run_id, "RUN"),
        (str(tmp_path), "/tmp/x"),
        (str(ROOT), "/checkout"),
    ):
        shown = shown.replace(found, name)
    golden("dry_run_disagg.txt", shown)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_values_reach_both_workers_unchanged(
    model: Path, name: str, tmp_path: Path
) -> None:
    """Let a shell run the printed commands with a Python that only notes what it was told."""
    folder = model.parent / f"m {name}".replace("/", "")
    model.rename(folder)
    shown = dry_run(folder, SERVED_MODEL_NAME=name, RUN_DIR=str(tmp_path / "runs"))
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    text = PYTHON.sub(lambda _: str(fake), shown)
    done = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "calls").read_bytes().decode().split("\0")
    assert words.count(str(folder)) == 2
    assert words.count(name) + words.count(f"--served-model-name={name}") == 2


def test_variables_choose_strategy_workers_configs_and_devices(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "it's mine.yaml"
    config.write_text("max_batch_size: 4\n")
    shown = dry_run(
        model,
        DISAGGREGATION_STRATEGY="prefill_first",
        NUM_DECODE_WORKERS="2",
        PREFILL_ENGINE_ARGS=str(config),
        MAX_LOCAL_PREFILL_LENGTH="64",
        PREFILL_CUDA_VISIBLE_DEVICES="3",
        DECODE_CUDA_VISIBLE_DEVICES="1,2",
        ENGINE="torch",
    )
    assert "1 prefill worker and 2 decode workers" in shown
    assert "--strategy prefill_first" in shown
    assert "it'\"'\"'s mine.yaml" in shown
    assert shown.count("--max-local-prefill-length 64") == 3
    assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", shown) == ["3", "1", "2"]


def test_unknown_strategy_is_refused_with_the_two_names(model: Path) -> None:
    done = run(model, DISAGGREGATION_STRATEGY="decode_frist")
    assert done.returncode == 2
    assert done.stderr == (
        "trtllm-launch: environment DISAGGREGATION_STRATEGY: must be one of decode_first, "
        "prefill_first, not 'decode_frist' (did you mean 'decode_first'?)\n"
    )


def test_configs_that_do_not_fit_are_refused_before_anything_starts(
    model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "d.yaml"
    config.write_text("kv_cache_config:\n  tokens_per_block: 64\n")
    done = run(model, DECODE_ENGINE_ARGS=str(config), RUN_DIR=str(tmp_path / "runs"))
    assert done.returncode == 2
    assert "kv_cache_config.tokens_per_block is 32 (" in done.stderr
    # The shorter of the file's absolute and relative path is shown.
    assert re.search(r"for prefill and 64 \(\S*d\.yaml:2\) for decode", done.stderr)
    assert not (tmp_path / "runs").exists()


def test_variables_without_effect_are_pointed_out(model: Path) -> None:
    done = run(model, "--dry-run", AGG_ENGINE_ARGS="gone.yaml")
    assert done.returncode == 0
    assert "note: environment AGG_ENGINE_ARGS has no effect: the run is disagg" in done.stderr

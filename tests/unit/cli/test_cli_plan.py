"""``plan`` and ``up --dry-run`` show what would happen, and do nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def run(model: Path, *words: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "MODEL_PATH": str(model), "ENGINE": "sim", **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dry_run_prints_the_plan_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for words in (("up", "--dry-run"), ("plan",)):
        shown = run(model, *words, RUN_DIR=str(runs), HTTP_PORT="9000")
        assert "# worker-0\n" in shown
        assert f"--model-path '{model}'" in shown
        assert "--http-port 9000" in shown
    assert not runs.exists()


def test_flag_wins_over_variable_and_show_config_says_so(model: Path) -> None:
    shown = run(model, "plan", "--show-config", "--http-port", "9001", HTTP_PORT="9000")
    lines = [line.split(maxsplit=2) for line in shown.splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 3 and line[1] != "config"}
    assert rows["http_port"] == ["9001", "--http-port"]
    assert rows["engine"] == ["sim", "environment ENGINE"]
    assert rows["max_batch_size"][1].startswith("engine_configs/agg.yaml:")


def test_secret_is_never_printed(model: Path) -> None:
    secret = "correct-horse-battery-staple"
    for words in (("plan",), ("plan", "--show-config"), ("up", "--dry-run")):
        assert secret not in run(model, *words, CLUSTER_SECRET=secret)


def test_engine_config_is_checked_before_anything_starts(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("max_batch_size: 8\nkv_cache_config:\n  tokens_per_blok: 32\n")
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", "up", "--engine-config", str(config)],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": os.environ["PATH"], "MODEL_PATH": str(model), "ENGINE": "sim"},
    )
    assert done.returncode == 2
    assert "mine.yaml:3: unknown key 'kv_cache_config.tokens_per_blok'" in done.stderr
    assert "did you mean" in done.stderr


def test_show_config_of_a_disaggregated_run_has_a_table_for_each_role(model: Path) -> None:
    shown = run(model, "plan", "--show-config", "--disaggregated", "--kv-transport", "tcp")
    prefill, decode = (
        shown.split(f"engine config of {role} workers (sim)")[1] for role in ("prefill", "decode")
    )
    assert "engine_configs/prefill.yaml:" in prefill
    assert "engine_configs/decode.yaml:" in decode
    assert "engine_configs/prefill.yaml:" not in decode
    assert "--disaggregated" in shown.split("engine config")[0]

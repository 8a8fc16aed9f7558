"""benchmarks/perf.sh with a fake command in its place: which words it passes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "perf.sh"
VARIABLES = {
    "URL": "--url",
    "MODEL": "--model",
    "ISL": "--isl",
    "OSL": "--osl",
    "CONCURRENCY": "--concurrency",
    "MODE": "--mode",
    "ARTIFACTS_ROOT_DIR": "--artifacts-root-dir",
    "DEPLOYMENT_KIND": "--deployment-kind",
}
FAKE = """#!/bin/bash
printf '%s\\0' "$@" > "$CALLS"
exit 7
"""


def called(tmp_path: Path, *words: str, **environ: str) -> list[str]:
    """Return the words that the command got."""
    folder = tmp_path / "my venv" / "bin"
    folder.mkdir(parents=True)
    fake = folder / "trtllm-launch"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    calls = tmp_path / "calls"
    done = subprocess.run(
        [str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "CALLS": str(calls),
            "TRTLLM_LAUNCH_VENV": str(folder.parent),
            **environ,
        },
    )
    assert done.returncode == 7, done.stderr
    return calls.read_text().split("\0")[:-1]


def test_script_is_short_and_keeps_to_the_rules() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 30
    assert "set -euo pipefail" in text
    assert os.access(SCRIPT, os.X_OK)


def test_without_words_it_measures_with_the_commands_defaults(tmp_path: Path) -> None:
    assert called(tmp_path) == ["bench", "run"]


@pytest.mark.parametrize("value", ["a model", "it's", 'say "hi"', "$HOME", "*", "-n", "new\nline"])
def test_variables_become_flags_unchanged(tmp_path: Path, value: str) -> None:
    words = called(tmp_path, **dict.fromkeys(VARIABLES, value))
    assert words == ["bench", "run", *(one for flag in VARIABLES.values() for one in (flag, value))]


def test_flags_come_last_and_so_win(tmp_path: Path) -> None:
    words = called(tmp_path, "--isl", "7", "--mode", "aggregated", ISL="3", OSL="")
    assert words == ["bench", "run", "--isl", "3", "--isl", "7", "--mode", "aggregated"]


def test_without_the_command_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PATH": os.environ["PATH"], "TRTLLM_LAUNCH_VENV": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"benchmarks/perf.sh: no trtllm-launch at {tmp_path}")

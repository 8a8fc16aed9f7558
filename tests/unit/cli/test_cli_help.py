"""What ``--help`` says, word for word, and what it must not cost."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner

from trtllm_workers.cli.main import COMMANDS, group
from trtllm_workers.config.options import LAUNCH_OPTIONS

# Importing any of these takes longer than the whole help may.
HEAVY = (
    "fastapi",
    "mpi4py",
    "numpy",
    "pydantic",
    "structlog",
    "tensorrt_llm",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
    "uvloop",
)
BUDGET_S = 0.5
ASK = """
import json, sys
from trtllm_workers.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    sys.stderr.write(json.dumps([ended.code, sorted(sys.modules)]))
"""


def help_of(*words: str) -> str:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(
        group, [*words, "--help"], prog_name="trtllm-launch"
    )
    assert shown.exit_code == 0, shown.output
    return shown.output


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_matches_its_golden_file(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"help_{name or 'trtllm-launch'}.txt", help_of(*([name] if name else [])))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_nothing_heavy_and_stays_within_its_time(name: str) -> None:
    words = [name, "--help"] if name else ["--help"]
    fastest = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", ASK, *words], capture_output=True, text=True, timeout=30
        )
        fastest = min(fastest, time.perf_counter() - began)
        code, modules = json.loads(done.stderr)
        assert code == 0
        assert not [one for one in HEAVY if one in modules]
        if fastest < BUDGET_S:
            break
    assert fastest < BUDGET_S


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_of_the_group_is_the_first_line_of_the_command(name: str) -> None:
    command = importlib.import_module(f"trtllm_workers.cli.{name.replace('-', '_')}").command
    assert isinstance(command, click.Command)
    assert command.name == name
    assert (command.help or "").splitlines()[0] == COMMANDS[name]
    assert len(COMMANDS[name]) <= 70


def test_up_shows_every_option_with_its_variables_and_default() -> None:
    shown = " ".join(help_of("up").split())
    for option in LAUNCH_OPTIONS:
        assert (option.flag or option.env[0]) in shown
        for variable in option.env:
            assert variable in shown
        if option.default_text:
            assert f"default: {option.default_text}" in shown


def test_command_without_words_shows_the_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main"],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: trtllm-launch ")

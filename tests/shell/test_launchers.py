"""Every launcher with a fake command in its place: which one it takes, and what it passes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launch"
HERE = os.uname().nodename
SHARED = "find_command.sh"
# What each adds to the command; agg.sh is the plain one.
WORDS = {
    "agg.sh": ["up"],
    "disagg.sh": ["up", "--disaggregated"],
    "gpt_oss_disagg.sh": ["up", "--disaggregated"],
    "agg_router.sh": ["up"],
    "disagg_router.sh": ["up", "--disaggregated"],
    "epd_disagg.sh": ["up", "--disaggregated"],
}
# Those whose first word says which step of a deployment on several hosts they are.
STEPS = {
    ("skeleton_agg.sh", "ingress"): ["ingress", "--plane-host", "0.0.0.0"],
    ("skeleton_agg.sh", "worker"): ["worker", "--worker-id", HERE, "--plane-host", "0.0.0.0"],
    ("skeleton_disagg.sh", "ingress"): ["ingress", "--plane-host", "0.0.0.0"],
    **{
        ("skeleton_disagg.sh", role): [
            *("worker", "--role", role, "--worker-id", f"{role}-{HERE}", "--plane-host", "0.0.0.0")
        ]
        for role in ("prefill", "decode")
    },
}
# Where an empty or missing MODEL_PATH is filled in.
MODELS = {"gpt_oss_disagg.sh": "/model"}
AWKWARD = ["a model", "it's", 'say "hi"', "a;b", "$HOME", "new\nline", "*", "-n", ""]
FAKE = """#!/bin/bash
printf '%s\\0' "$@" > "$CALLS"
printf '%s\\0' "$MODEL_PATH" > "$CALLS.model"
exit 7
"""


@pytest.fixture(params=sorted(WORDS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    return tmp_path / "calls"


def fake_cli(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fake = folder / "trtllm-launch"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    return folder


def run(
    launcher: Path, *words: str, calls: Path, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(launcher), *words],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "CALLS": str(calls), **env},
    )


def words_of(path: Path) -> list[str]:
    return path.read_text().split("\0")[:-1]


def copied_launcher(tmp_path: Path, name: str) -> Path:
    """Return a launcher in a checkout of its own, without an environment beside it."""
    folder = tmp_path / "check out" / "launch"
    folder.mkdir(parents=True)
    copy = folder / name
    copy.write_text((FOLDER / name).read_text())
    copy.chmod(0o755)
    (folder / SHARED).write_text((FOLDER / SHARED).read_text())
    return copy


def test_every_launcher_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.sh")} == {
        *(SHARED, *WORDS),
        *(script for script, _ in STEPS),
    }


def test_launcher_is_short_and_keeps_to_the_rules(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert len(text.splitlines()) <= 30
    assert "set -euo pipefail" in text
    assert f'exec "$cli" {" ".join(WORDS[name])} "$@"' in text
    assert f"launch/{name} --dry-run" in text
    assert os.access(FOLDER / name, os.X_OK)


def test_what_is_only_sourced_cannot_be_run() -> None:
    assert len((FOLDER / SHARED).read_text().splitlines()) <= 30
    assert not os.access(FOLDER / SHARED, os.X_OK)


@pytest.mark.parametrize("word", AWKWARD)
def test_launcher_passes_words_and_variables_through_unchanged(
    name: str, word: str, tmp_path: Path, calls: Path
) -> None:
    venv = fake_cli(tmp_path / "my venv" / "bin").parent
    launcher = FOLDER / name
    done = run(launcher, "--set", word, calls=calls, TRTLLM_LAUNCH_VENV=str(venv), MODEL_PATH=word)
    assert done.returncode == 7, done.stderr
    assert words_of(calls) == [*WORDS[name], "--set", word]
    assert words_of(Path(f"{calls}.model")) == [word or MODELS.get(name, "")]


def test_launcher_takes_the_environment_beside_it(name: str, tmp_path: Path, calls: Path) -> None:
    launcher = copied_launcher(tmp_path, name)
    fake_cli(launcher.parents[1] / ".venv" / "bin")
    assert run(launcher, calls=calls).returncode == 7
    assert words_of(calls) == WORDS[name]


def test_launcher_takes_the_command_on_path_last(name: str, tmp_path: Path, calls: Path) -> None:
    launcher = copied_launcher(tmp_path, name)
    on_path = fake_cli(tmp_path / "bin")
    path = f"{on_path}:{os.environ['PATH']}"
    assert run(launcher, "--dry-run", calls=calls, PATH=path).returncode == 7
    assert words_of(calls) == [*WORDS[name], "--dry-run"]


def test_launcher_works_from_anywhere_and_through_a_link(
    name: str, tmp_path: Path, calls: Path
) -> None:
    launcher = copied_launcher(tmp_path, name)
    fake_cli(launcher.parents[1] / ".venv" / "bin")
    link = tmp_path / "elsewhere" / "serve"
    link.parent.mkdir()
    link.symlink_to(launcher)
    assert run(link, calls=calls, cwd=Path("/")).returncode == 7


@pytest.mark.parametrize("named", [False, True])
def test_launcher_without_an_environment_says_what_to_run(
    name: str, tmp_path: Path, calls: Path, named: bool
) -> None:
    launcher = copied_launcher(tmp_path, name)
    venv = "/no/venv" if named else ""
    done = run(launcher, calls=calls, PATH="/usr/bin:/bin", TRTLLM_LAUNCH_VENV=venv)
    assert done.returncode == 2
    assert f"launch/{name}: no trtllm-launch" in done.stderr
    assert f"run 'make setup' in {launcher.parents[1]} first" in done.stderr
    assert ("/no/venv/bin/trtllm-launch" in done.stderr) is named


@pytest.mark.parametrize(("script", "step"), STEPS)
def test_steps_become_the_command_with_what_is_said_besides(
    script: str, step: str, tmp_path: Path, calls: Path
) -> None:
    text = (FOLDER / script).read_text()
    assert len(text.splitlines()) <= 30
    assert f"launch/{script} {step}" in text
    venv = fake_cli(tmp_path / "my venv" / "bin").parent
    for word in AWKWARD:
        done = run(FOLDER / script, step, "--x", word, calls=calls, TRTLLM_LAUNCH_VENV=str(venv))
        assert done.returncode == 7, done.stderr
        assert words_of(calls) == [*STEPS[script, step], "--x", word]


@pytest.mark.parametrize("words", [[], ["sideways"], ["--dry-run"]])
@pytest.mark.parametrize("script", sorted({script for script, _ in STEPS}))
def test_a_step_that_is_none_is_refused(
    script: str, words: list[str], tmp_path: Path, calls: Path
) -> None:
    venv = fake_cli(tmp_path / "bin").parent
    done = run(FOLDER / script, *words, calls=calls, TRTLLM_LAUNCH_VENV=str(venv))
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: {script} ingress|")
    assert not calls.exists()

"""Ending runs from another process, and listing them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.deploy.support import gone, launched_fakes
from trtllm_workers.deploy.listing import as_table, rows_of
from trtllm_workers.deploy.run import Run, find_runs
from trtllm_workers.deploy.stop import choose_runs, stop_run
from trtllm_workers.errors import ConfigError

READY = r"ready after"


def command(words: Sequence[str], root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trtllm_workers.cli.main", *words, "--run-dir", str(root)],
        capture_output=True,
        text=True,
        timeout=30,
    )


def runs_named(*ids: str) -> list[Run]:
    return [Run(run_id, None, None) for run_id in ids]


def test_only_run_needs_no_id() -> None:
    assert [run.run_id for run in choose_runs(runs_named("abc123"), None, every=False)] == [
        "abc123"
    ]
    assert choose_runs([], None, every=False) == []


def test_several_runs_are_listed_instead_of_guessed() -> None:
    with pytest.raises(ConfigError, match=r"stop abc123\|def456, or trtllm-launch stop --all"):
        choose_runs(runs_named("abc123", "def456"), None, every=False)
    assert len(choose_runs(runs_named("abc123", "def456"), None, every=True)) == 2


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("abc124", "did you mean abc123?"),
        ("def", "did you mean def456?"),
        ("zzzzzz", "there are: abc123, def456"),
    ],
)
def test_unknown_run_names_the_nearest(given: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_runs(runs_named("abc123", "def456"), given, every=False)
    assert hint in str(caught.value)


@pytest.mark.e2e
def test_stop_and_ps_from_another_process(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("daemon",)) as launch:
        grandchild = int(launch.wait_for(r"grandchild (\d+)")[1])
        launch.wait_for(READY)
        rows = json.loads(command(["ps", "--json"], tmp_path).stdout)
        mine = {row["process"]: row for row in rows if row["run_id"] == "abc123"}
        assert mine["launcher"]["state"] == "ready"
        assert mine["worker-0"]["state"] == "registered"
        assert mine["ingress"]["url"].startswith("http://127.0.0.1:")
        assert mine["worker-0's child"]["pid"] == grandchild
        assert all(row["rss_bytes"] > 0 and row["uptime_s"] > 0 for row in mine.values())
        stopped = command(["stop", "abc123"], tmp_path)
        assert stopped.returncode == 0
        assert "ended ingress, launcher, worker-0" in stopped.stdout
        assert launch.wait() == 0
        assert gone(grandchild, timeout_s=0.0)
        assert not launch.folder.exists()
        assert "unknown run 'abc123'" in command(["stop", "abc123"], tmp_path).stderr


@pytest.mark.e2e
def test_stop_ends_what_a_killed_launcher_and_guard_left(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("ignore-term", "grandchild")) as launch:
        grandchild = int(launch.wait_for(r"grandchild (\d+)")[1])
        launch.wait_for(READY)
        (run,) = (one for one in find_runs([tmp_path]) if one.run_id == "abc123")
        worker = next(pid for pid, (name, one) in run.members.items() if one.session == pid)
        for guard in _children_of(launch.pid):
            if guard not in run.members:
                os.kill(guard, signal.SIGKILL)
        os.kill(launch.pid, signal.SIGKILL)
        launch.popen.wait(10)
        (run,) = (one for one in find_runs([tmp_path]) if one.run_id == "abc123")
        assert run.launcher is None
        listed = as_table(rows_of([run]), [run])
        assert "run abc123 lost its launcher; end what is left: trtllm-launch stop abc123" in listed
        stopped = stop_run(run, [tmp_path], hurry=True)
        assert not stopped.left
        assert gone(worker, timeout_s=0.0)
        assert gone(grandchild, timeout_s=0.0)
        assert not launch.folder.exists()
        again = [one for one in find_runs([tmp_path]) if one.run_id == "abc123"]
        assert again == []


def _children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

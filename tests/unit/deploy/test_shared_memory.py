"""What workers leave in /dev/shm goes with them, whoever ends the run; other names stay."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.deploy.support import launched_fakes
from trtllm_workers.deploy.run import Run, RunFolder
from trtllm_workers.deploy.shm import shm_name
from trtllm_workers.deploy.stop import stop_run

pytestmark = pytest.mark.e2e

READY = r"ready after"


@pytest.fixture
def run_id() -> str:
    return f"t{os.urandom(4).hex()}"


@pytest.fixture
def left(run_id: str) -> Iterator[list[Path]]:
    """Files such as worker-0 and worker-1 would leave, and one of another run."""
    names = [shm_name(run_id, "worker-0"), f"{shm_name(run_id, 'worker-1')}_l0"]
    names.append(shm_name(f"{run_id}0", "worker-0"))
    files = [Path("/dev/shm") / name for name in names]
    for file in files:
        file.touch()
    yield files
    for file in files:
        file.unlink(missing_ok=True)


def test_it_goes_with_the_run(tmp_path: Path, run_id: str, left: list[Path]) -> None:
    with launched_fakes(tmp_path, run_id=run_id) as launch:
        launch.wait_for(READY)
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        assert [file.exists() for file in left] == [False, False, True]


def test_it_goes_when_the_launcher_is_killed(tmp_path: Path, run_id: str, left: list[Path]) -> None:
    with launched_fakes(tmp_path, run_id=run_id) as launch:
        launch.wait_for(READY)
        os.kill(launch.pid, signal.SIGKILL)
        launch.wait()  # ends only when the guard has ended
        assert [file.exists() for file in left] == [False, False, True]


def test_that_of_a_dead_worker_goes_before_it_is_started_again(
    tmp_path: Path, run_id: str, left: list[Path]
) -> None:
    with launched_fakes(tmp_path, run_id=run_id, max_restarts=1) as launch:
        launch.wait_for(READY)
        os.kill(int(launch.wait_for(r"\[worker-0\] pid (\d+)")[1]), signal.SIGKILL)
        launch.wait_for("is ready again")
        assert [file.exists() for file in left] == [False, True, True]
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0


def test_stop_removes_what_a_lost_run_left(tmp_path: Path, run_id: str, left: list[Path]) -> None:
    (tmp_path / run_id).mkdir()
    stop_run(Run(run_id, RunFolder(tmp_path / run_id), None), [tmp_path])
    assert [file.exists() for file in left] == [False, False, True]

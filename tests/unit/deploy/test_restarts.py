"""Workers that die while a run serves: how often they are started again, and what is told of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest

from tests.unit.deploy.support import Launch, gone, launched_fakes
from trtllm_workers.deploy import report
from trtllm_workers.deploy.listing import as_table, rows_of
from trtllm_workers.deploy.restarts import Restarts
from trtllm_workers.deploy.run import ProcessRecord, Run, RunFolder

READY = r"ready after"
AGAIN = r"worker-0 is ready again after"


def test_pauses_double_up_to_half_a_minute() -> None:
    restarts = Restarts(7)
    pauses = [restarts.after_death("a", 0.0) for _ in range(7)]
    assert [one.pause_s for one in pauses if one] == [1, 2, 4, 8, 16, 30, 30]
    assert restarts.after_death("a", 1.0) is None


def test_starts_older_than_the_window_do_not_count() -> None:
    restarts = Restarts(2)
    first = restarts.after_death("a", 0.0)
    assert str(first) == "restart 1 of 2 within 10 minutes"
    assert restarts.after_death("a", 599.0) is not None
    assert restarts.after_death("a", 599.5) is None
    late = restarts.after_death("a", 600.0)
    assert late is not None
    assert (late.number, late.pause_s) == (2, 2.0)
    assert restarts.total("a") == 3


def test_each_worker_has_restarts_of_its_own() -> None:
    restarts = Restarts(1)
    assert restarts.after_death("a", 0.0) is not None
    assert restarts.after_death("b", 0.0) is not None
    assert restarts.after_death("a", 0.0) is None
    assert restarts.total("c") == 0


def test_limit_of_zero_starts_nothing_again() -> None:
    assert Restarts(0).after_death("a", 0.0) is None


def test_huge_limit_keeps_the_longest_pause() -> None:
    restarts = Restarts(5000)
    pauses = [restarts.after_death("a", 0.0) for _ in range(5000)]
    assert pauses[-1] is not None
    assert pauses[-1].pause_s == 30.0


def test_report_says_how_often_it_was_restarted() -> None:
    text = report.death(
        "worker-0", -9, after_s=1.0, step="ready", lines=[], log=None, restarted="it had been twice"
    )
    assert "the run was ended with it\nit had been twice\n" in text


def test_records_of_older_versions_are_read() -> None:
    old = b'{"name":"worker-0","role":"aggregated","pid":5,"start_ticks":7,"log":""}'
    assert msgspec.json.decode(old, type=ProcessRecord).restarts == 0


def pid_of_life(launch: Launch, life: int) -> int:
    again = f"life {life} " if life else ""
    return int(launch.wait_for(rf"^\[worker-0\] {again}pid (\d+)$")[1])


@pytest.mark.e2e
def test_worker_that_dies_is_started_again_and_ps_counts_it(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("life0:grandchild",), max_restarts=2) as launch:
        grandchild = int(launch.wait_for(r"grandchild (\d+)")[1])
        launch.wait_for(READY)
        first = pid_of_life(launch, 0)
        os.kill(first, signal.SIGKILL)
        launch.wait_for(r"worker-0 was killed by SIGKILL \(signal 9\)")
        launch.wait_for(r"worker-0 is started again in 1\.0 s \(restart 1 of 2 within 10 minutes\)")
        launch.wait_for(AGAIN)
        assert gone(grandchild, timeout_s=0.0)
        assert pid_of_life(launch, 1) != first
        folder = RunFolder(launch.folder)
        record = folder.read()
        assert record is not None
        assert [(one.name, one.restarts) for one in record.processes] == [
            ("worker-0", 1),
            ("ingress", 0),
        ]
        run = Run(record.run_id, folder, record)
        assert [row.restarts for row in rows_of([run])] == [0, 1, 0]
        assert "RESTARTS" in as_table(rows_of([run]), [run]).splitlines()[0]
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        # What explains the death is kept, although the run ended well.
        log = (launch.folder / "logs" / "worker-0.log").read_text()
        assert "--- worker-0 was killed by SIGKILL" in log
        assert f"pid {first}\n" in log


@pytest.mark.e2e
def test_run_ends_when_the_restarts_are_used_up(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, max_restarts=1) as launch:
        launch.wait_for(READY)
        os.kill(pid_of_life(launch, 0), signal.SIGKILL)
        launch.wait_for(AGAIN)
        os.kill(pid_of_life(launch, 1), signal.SIGSEGV)
        assert launch.wait() == 4
        assert "worker-0 was killed by SIGSEGV (signal 11): segmentation fault" in launch.text
        assert "it had been started again once (--max-restarts 1 within 10 minutes)" in launch.text
        assert "had come to 'ready'" in launch.text


@pytest.mark.e2e
def test_worker_that_cannot_start_again_uses_up_its_restarts(tmp_path: Path) -> None:
    """The status file of the first life says registered; it must not make a later life look ready."""
    dies = ("life1:exit:3", "life2:exit:3")
    with launched_fakes(tmp_path, worker=dies, max_restarts=2) as launch:
        launch.wait_for(READY)
        os.kill(pid_of_life(launch, 0), signal.SIGKILL)
        assert launch.wait() == 4
        assert "worker-0 ended with exit code 3: it could not start" in launch.text
        assert "it had been started again 2 times" in launch.text
        assert "had come to 'starting'" in launch.text
        assert "ready again" not in launch.text


@pytest.mark.e2e
def test_worker_that_hangs_when_started_again_is_ended_and_started_once_more(
    tmp_path: Path,
) -> None:
    with launched_fakes(
        tmp_path, worker=("life1:stuck",), max_restarts=2, start_timeout_s=3.0
    ) as launch:
        launch.wait_for(READY)
        os.kill(pid_of_life(launch, 0), signal.SIGKILL)
        launch.wait_for(r"worker-0 is not ready after 3\.0 s: stuck at 'model 60 %' for")
        launch.wait_for(rf"{AGAIN} .*restart 2 of 2")
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0


@pytest.mark.e2e
@pytest.mark.parametrize("when", ["pause", "restart"])
def test_ctrl_c_while_a_worker_is_started_again_ends_everything(tmp_path: Path, when: str) -> None:
    with launched_fakes(
        tmp_path, worker=("life1:stuck",), max_restarts=3, endless_pause=when == "pause"
    ) as launch:
        launch.wait_for(READY)
        os.kill(pid_of_life(launch, 0), signal.SIGKILL)
        launch.wait_for("is started again" if when == "pause" else r"\[worker-0\] model 60 %")
        os.kill(launch.pid, signal.SIGINT)
        assert launch.wait() == 130
        ingress = int(launch.wait_for(r"\[ingress\] pid (\d+)")[1])
        assert gone(ingress, timeout_s=0.0)
        assert not (launch.folder / "run.json").exists()


@pytest.mark.e2e
def test_death_of_the_ingress_ends_the_run_whatever_restarts_are_left(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, max_restarts=3) as launch:
        launch.wait_for(READY)
        os.kill(int(launch.wait_for(r"\[ingress\] pid (\d+)")[1]), signal.SIGKILL)
        assert launch.wait() == 4
        assert "ingress was killed by SIGKILL (signal 9)" in launch.text


@pytest.mark.e2e
def test_death_during_the_start_ends_the_run_whatever_restarts_are_left(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("exit:2",), max_restarts=3) as launch:
        assert launch.wait() == 3
        assert "started again" not in launch.text

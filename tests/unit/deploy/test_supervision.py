"""Real launchers with stand-ins for ingress and worker: who dies, who is told, and what is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.unit.deploy.support import gone, launched_fakes
from trtllm_workers.deploy.run import RunFolder

pytestmark = pytest.mark.e2e

READY = r"ready after"


def pid_of(launch_text: str, name: str) -> int:
    line = next(line for line in launch_text.splitlines() if line.startswith(f"[{name}] pid "))
    return int(line.rsplit(" ", 1)[1])


def test_run_says_each_step_and_ends_with_130_on_ctrl_c(tmp_path: Path) -> None:
    with launched_fakes(tmp_path) as launch:
        launch.wait_for(READY)
        record = RunFolder(launch.folder).read()
        assert record is not None
        assert {one.name for one in record.processes} == {"worker-0", "ingress"}
        assert record.launcher.pid == launch.pid
        assert launch.folder.stat().st_mode & 0o777 == 0o700
        os.kill(launch.pid, signal.SIGINT)
        assert launch.wait() == 130
        for said in ("[worker-0] registered", "[ingress] listening on http", "for one token"):
            assert said in launch.text
        assert launch.text.index("[ingress] draining") < launch.text.index("[worker-0] draining")
        assert not launch.folder.exists()
        assert gone(pid_of(launch.text, "worker-0"))
        assert gone(pid_of(launch.text, "ingress"))


def test_run_ends_with_0_on_sigterm(tmp_path: Path) -> None:
    with launched_fakes(tmp_path) as launch:
        launch.wait_for(READY)
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0


def test_ctrl_c_during_the_start_ends_the_run_at_once(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("stuck",)) as launch:
        launch.wait_for(r"\[worker-0\] model 60 %")
        os.kill(launch.pid, signal.SIGINT)
        assert launch.wait() == 130
        assert not launch.folder.exists()


def test_death_of_a_worker_ends_the_run_and_names_the_culprit(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("print:" + b"about to serve\n".hex(),)) as launch:
        launch.wait_for(READY)
        os.kill(pid_of(launch.text, "worker-0"), signal.SIGSEGV)
        assert launch.wait() == 4
        assert "worker-0 was killed by SIGSEGV (signal 11): segmentation fault" in launch.text
        assert "  | about to serve" in launch.text
        assert gone(pid_of(launch.text, "ingress"))
        log = launch.folder / "logs" / "worker-0.log"
        assert f"whole log: {log}" in launch.text
        assert "about to serve" in log.read_text()
        assert sorted(path.name for path in launch.folder.iterdir()) == ["logs"]


def test_death_of_the_ingress_ends_the_run_too(tmp_path: Path) -> None:
    with launched_fakes(tmp_path) as launch:
        launch.wait_for(READY)
        os.kill(pid_of(launch.text, "ingress"), signal.SIGKILL)
        assert launch.wait() == 4
        assert "ingress was killed by SIGKILL (signal 9)" in launch.text
        assert gone(pid_of(launch.text, "worker-0"))


def test_exit_before_ready_is_a_failed_start(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("print:" + b"no such shard\n".hex(), "exit:2")) as launch:
        assert launch.wait() == 3
        assert "worker-0 ended with exit code 2: a setting is wrong" in launch.text
        assert "  | no such shard" in launch.text
        assert "had come to 'starting'" in launch.text


def test_command_that_does_not_exist_is_a_failed_start(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, argv={"ingress": ["/no/such/program"]}) as launch:
        assert launch.wait() == 3
        assert "ingress could not be started: No such file or directory" in launch.text
        assert "/no/such/program" in launch.text


def test_stuck_start_names_the_step_and_the_last_lines(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("stuck",), start_timeout_s=1.0) as launch:
        assert launch.wait() == 3
        assert "worker-0 is stuck at 'model 60 %' for" in launch.text
        assert "  | mapping shard 3 of 5" in launch.text
        assert "--start-timeout-s" in launch.text


def test_refused_probe_is_a_failed_start_with_the_reason(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, ingress=("http:500",)) as launch:
        assert launch.wait() == 3
        assert "one-token probe of model 'fake' failed: HTTP 500: the fake says no" in launch.text


def test_probe_that_never_succeeds_is_named_when_time_is_up(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, ingress=("http:503",), start_timeout_s=1.0) as launch:
        assert launch.wait() == 3
        assert "one-token probe got no answer: HTTP 503: the fake says no" in launch.text


def test_process_that_ignores_term_is_killed_and_named(tmp_path: Path) -> None:
    with launched_fakes(
        tmp_path, worker=("ignore-term",), drain_timeout_s=0.0, hasty=True
    ) as launch:
        launch.wait_for(READY)
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        assert "worker-0 did not end in time and had to be killed" in launch.text
        assert gone(pid_of(launch.text, "worker-0"))


def test_second_ctrl_c_does_not_wait_for_the_drain(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, ingress=("ignore-term",), drain_timeout_s=600.0) as launch:
        launch.wait_for(READY)
        os.kill(launch.pid, signal.SIGINT)
        launch.wait_for("Ctrl-C: stopping")
        os.kill(launch.pid, signal.SIGINT)
        assert launch.wait() == 130
        assert gone(pid_of(launch.text, "ingress"))


@pytest.mark.parametrize("kind", ["grandchild", "daemon"])
def test_grandchildren_end_with_the_run_wherever_they_moved(tmp_path: Path, kind: str) -> None:
    with launched_fakes(tmp_path, worker=(kind,)) as launch:
        grandchild = int(launch.wait_for(r"grandchild (\d+)")[1])
        launch.wait_for(READY)
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        assert gone(grandchild)


def test_nothing_survives_the_kill_of_the_launcher(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, worker=("daemon", "ignore-term"), drain_timeout_s=0.2) as launch:
        grandchild = int(launch.wait_for(r"grandchild (\d+)")[1])
        launch.wait_for(READY)
        os.kill(launch.pid, signal.SIGKILL)
        launch.wait()  # ends only when the guard, which holds the same pipe, has ended
        assert "the launcher of run abc123 died; ended" in launch.text
        for pid in (grandchild, pid_of(launch.text, "worker-0"), pid_of(launch.text, "ingress")):
            assert gone(pid, timeout_s=0.0)
        assert [path.name for path in launch.folder.iterdir()] == ["logs"]


def test_output_is_prefixed_and_made_printable_and_kept_as_it_was(tmp_path: Path) -> None:
    raw = b"tick\r tock\nbad \xff byte\n\x1b]0;title\x07 gone\n" + b"x" * 20_000 + b"\nno newline"
    with launched_fakes(
        tmp_path, worker=(f"print:{raw.hex()}", "exit:1"), log_dir=str(tmp_path / "logs")
    ) as launch:
        assert launch.wait() == 3
        for line in (
            "[worker-0] tick",
            "[worker-0]  tock",
            "[worker-0] bad \\xff byte",
            "[worker-0] \\x1b]0;title\\x07 gone",
            "[worker-0] no newline",
        ):
            assert line in launch.lines
        assert sum(len(line) for line in launch.lines if set(line[11:]) == {"x"}) > 20_000
        assert raw in (tmp_path / "logs" / "worker-0.log").read_bytes()
        assert f"logs are in {tmp_path / 'logs'}" in launch.text


def test_full_disk_for_logs_is_said_once_and_serving_goes_on(tmp_path: Path) -> None:
    with launched_fakes(tmp_path, log="/dev/full") as launch:
        launch.wait_for(READY)
        assert launch.text.count("No space left on device") == 1
        assert "serving goes on" in launch.text
        assert "[worker-0] pid " in launch.text
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0


def test_two_launchers_do_not_disturb_each_other(tmp_path: Path) -> None:
    with (
        launched_fakes(tmp_path, run_id="aaa111") as one,
        launched_fakes(tmp_path, run_id="bbb222") as other,
    ):
        one.wait_for(READY)
        other.wait_for(READY)
        os.kill(one.pid, signal.SIGINT)
        assert one.wait() == 130
        assert not gone(pid_of(other.text, "worker-0"), timeout_s=0.0)
        os.kill(other.pid, signal.SIGINT)
        assert other.wait() == 130

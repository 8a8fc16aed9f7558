"""Run folders and records: whose they are, what is found, what is kept."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from trtllm_workers.deploy import proc
from trtllm_workers.deploy import run as runs
from trtllm_workers.deploy.run import (
    ProcessRecord,
    RunFolder,
    RunRecord,
    create_run,
    find_runs,
    usable_root,
)
from trtllm_workers.errors import ConfigError

WAIT = (sys.executable, "-S", "-c", "import sys; print(1, flush=True); sys.stdin.read()")


@contextmanager
def running(env: dict[str, str]) -> Iterator[int]:
    """Start a process that ends with this block."""
    with subprocess.Popen(
        WAIT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        try:
            yield popen.pid
        finally:
            popen.kill()


def recorded(name: str, pid: int, start_ticks: int | None = None) -> ProcessRecord:
    found = proc.read(pid)
    assert found is not None
    ticks = found.start_ticks if start_ticks is None else start_ticks
    return ProcessRecord(name=name, role="aggregated", pid=pid, start_ticks=ticks)


def write_record(folder: RunFolder, *processes: ProcessRecord, **changes: object) -> RunRecord:
    record = RunRecord(
        run_id=folder.run_id,
        host=socket.gethostname(),
        boot_id=proc.boot_id(),
        started_at_s=1.0,
        launcher=ProcessRecord(name="launcher", role="launcher", pid=2**22, start_ticks=1),
        processes=processes,
    )
    record = msgspec.structs.replace(record, **changes)
    folder.write(record)
    return record


def new_folder(root: Path, run_id: str = "abc123") -> RunFolder:
    folder = RunFolder(root / run_id)
    create_run(folder)
    return folder


def only_run(root: Path) -> runs.Run:
    (run,) = find_runs([root], elsewhere=False)
    return run


def test_record_survives_the_file(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    record = write_record(folder, recorded("worker-0", os.getpid()))
    assert folder.read() == record
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_run_is_found_by_recorded_pid_and_start_time(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    with running({}) as pid:
        write_record(folder, recorded("worker-0", pid))
        run = only_run(tmp_path)
        assert {one: name for one, (name, _) in run.members.items()} == {pid: "worker-0"}
    assert not only_run(tmp_path).alive


def test_process_that_took_over_the_pid_is_a_stranger(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    with running({}) as pid:
        write_record(folder, recorded("worker-0", pid, start_ticks=12345))
        assert not only_run(tmp_path).alive


def test_process_is_found_by_the_run_id_in_its_environment(tmp_path: Path) -> None:
    folder = new_folder(tmp_path)
    tags = {runs.RUN_ID: "abc123", runs.PROCESS: "worker-7", runs.RUN_FOLDER: str(folder.path)}
    with running(tags) as pid:
        write_record(folder)
        assert only_run(tmp_path).members[pid][0] == "worker-7"
        # Found elsewhere too: the environment says where the folder is.
        (found,) = (run for run in find_runs([tmp_path / "other"]) if run.run_id == "abc123")
        assert found.folder == folder
        assert pid in found.members


def test_pids_of_another_boot_or_host_mean_nothing(tmp_path: Path) -> None:
    with running({}) as pid:
        write_record(new_folder(tmp_path, "reboot"), recorded("w", pid), boot_id="another")
        write_record(new_folder(tmp_path, "remote"), recorded("w", pid), host="elsewhere")
        run = only_run(tmp_path)
        assert (run.run_id, run.alive) == ("reboot", False)


def test_record_that_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    (new_folder(tmp_path).path / "run.json").write_text('{"run_id": 3')
    assert find_runs([tmp_path, tmp_path / "missing"], elsewhere=False) == []


def test_remove_keeps_logs_only_when_told_and_only_full_ones(tmp_path: Path) -> None:
    for run_id, text, keep in (("aa", "hello", True), ("bb", "", True), ("cc", "hello", False)):
        folder = new_folder(tmp_path, run_id)
        (folder.logs / "worker-0.log").write_text(text)
        write_record(folder)
        assert folder.remove(keep_logs=keep) is (run_id == "aa")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "aa",
        "aa/logs",
        "aa/logs/worker-0.log",
    ]


def test_only_the_latest_logs_of_failed_runs_are_kept(tmp_path: Path) -> None:
    for number in range(14):
        folder = new_folder(tmp_path, f"{number:06x}")
        (folder.logs / "worker-0.log").write_text("x")
        folder.remove(keep_logs=True)
        os.utime(folder.path, (number, number))
    write_record(new_folder(tmp_path, "ffffff"))
    assert len(list(tmp_path.iterdir())) == 11
    assert (tmp_path / "00000d").is_dir()
    assert not (tmp_path / "000000").exists()


def test_root_that_cannot_be_made_is_a_configuration_error_when_it_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="Not a directory; choose another place with --run-dir"):
        usable_root(tmp_path / "file" / "runs", chosen=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fallback = usable_root(tmp_path / "file" / "runs", chosen=False)
    assert fallback == tmp_path / f"trtllm-launch-{os.getuid()}"
    assert fallback.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder of somebody else")
def test_root_of_somebody_else_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    os.chown(root, 12345, 12345)
    with pytest.raises(ConfigError, match="it belongs to somebody else"):
        usable_root(root, chosen=True)


def test_signal_reaches_only_the_process_that_was_meant() -> None:
    with running({}) as pid:
        found = proc.read(pid)
        assert found is not None
        assert not proc.send(earlier_life(found), 15)
        assert proc.wait_gone([found], 0.0) == [found]
        assert proc.send(found, 15)
        assert proc.wait_gone([found], 10.0) == []
        assert proc.same(found.pid, found.start_ticks) is None


def earlier_life(found: proc.Proc) -> proc.Proc:
    """Return the same pid as another life of it."""
    return proc.Proc(
        pid=found.pid,
        ppid=found.ppid,
        pgid=found.pgid,
        session=found.session,
        state=found.state,
        start_ticks=found.start_ticks - 1,
        rss_bytes=0,
    )

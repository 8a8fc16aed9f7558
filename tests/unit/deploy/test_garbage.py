"""gc clears what dead runs left here, and touches nothing that lives or that cannot be judged from here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.deploy.papers import ended, run_folder
from tests.unit.deploy.support import gone
from trtllm_workers.deploy import garbage, proc
from trtllm_workers.deploy.garbage import Collected, collect_garbage
from trtllm_workers.deploy.parent import PARENT_PID
from trtllm_workers.deploy.run import (
    PROCESS,
    RUN_FOLDER,
    RUN_HOST,
    RUN_ID,
    ProcessRecord,
    RunFolder,
    create_run,
)
from trtllm_workers.planes import record_files
from trtllm_workers.planes.record_codec import Owner
from trtllm_workers.types import NO_ENGINE, Address, Role, WorkerRecord

# No two test runs on one machine may take each other's processes for their own.
RUN = os.urandom(3).hex()
WAIT = (sys.executable, "-S", "-c", "import sys; print(1, flush=True); sys.stdin.read()")


@contextmanager
def running(**env: str) -> Iterator[int]:
    """Start a process with these variables that ends with this block."""
    with subprocess.Popen(
        WAIT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        try:
            yield popen.pid
        finally:
            popen.kill()


def tags(folder: RunFolder, **more: str) -> dict[str, str]:
    return {
        RUN_ID: folder.run_id,
        RUN_FOLDER: str(folder.path),
        RUN_HOST: socket.gethostname(),
        PROCESS: "worker-0",
        **more,
    }


def launcher_of(pid: int) -> ProcessRecord:
    found = proc.read(pid)
    assert found is not None
    return ProcessRecord(name="launcher", role="launcher", pid=pid, start_ticks=found.start_ticks)


def collect(root: Path, run_id: str | None = None, **more: bool) -> Collected:
    shm = root.parent / "shm"
    shm.mkdir(exist_ok=True)
    return collect_garbage(root, run_id, grace_s=2.0, shm=shm, **more)


def kinds(found: Collected) -> list[tuple[str, str]]:
    return [(one.run_id, one.kind) for one in found.removed]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "runs"
    made.mkdir()
    (tmp_path / "shm").mkdir()
    return made


def memory(root: Path, run_id: str) -> Path:
    path = root.parent / "shm" / f"trtllm_launch_{run_id}_worker-0_x"
    path.write_bytes(b"1")
    return path


def test_a_dead_run_goes_with_all_it_left_and_stays_in_the_history(root: Path) -> None:
    folder, _ = run_folder(root, RUN)
    shared = memory(root, RUN)
    strange = root.parent / "shm" / "somebody_elses"
    strange.write_text("")
    with socket.socket(socket.AF_UNIX) as listener, running(**tags(folder)) as pid:
        listener.bind(str(folder.path / "s.sock"))
        dry = collect(root, dry_run=True)
        assert sorted(one for _, one in kinds(dry)) == ["folder", "memory", "process", "socket"]
        assert shared.exists()
        assert folder.path.exists()
        assert proc.read(pid) is not None
        found = collect(root)
        assert kinds(found) == kinds(dry)
        assert found.left == []
        assert gone(pid)
    assert not folder.path.exists()
    assert not shared.exists()
    assert strange.exists()
    assert (root / "history" / RUN / "resolved.json").exists()
    assert kinds(collect(root)) == []


def test_a_live_run_beside_it_is_not_touched(root: Path) -> None:
    with running() as launcher:
        live, _ = run_folder(root, "11fe11", launcher=launcher_of(launcher))
        dead, _ = run_folder(root, "dead00")
        shared = memory(root, "11fe11")
        with running(**tags(live)) as worker, running(**tags(dead)) as orphan:
            found = collect(root)
            assert {one.run_id for one in found.removed} == {"dead00"}
            assert gone(orphan)
            alive = proc.read(worker)
            assert alive is not None
            assert alive.alive
        assert shared.exists()
        assert live.path.exists()
        assert [one.run_id for one in found.spared] == ["11fe11"]
        assert f"launcher {launcher}" in found.spared[0].why
        # Nor does anybody's word count against what is seen.
        assert kinds(collect(root, "11fe11", ended=True)) == []
        assert live.path.exists()


def test_a_run_whose_guard_lives_is_the_guards(root: Path) -> None:
    with running() as guard:
        run_folder(root, RUN, guard=launcher_of(guard))
        found = collect(root)
    assert found.removed == []
    assert "its guard" in found.spared[0].why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"host": "another-host"}, "it is of host another-host; run gc there"),
        ({"pid_namespace": "pid:[1]"}, "another container"),
        ({"boot_id": "another"}, "another boot"),
    ],
)
def test_what_cannot_be_judged_from_here_is_left_alone(
    root: Path, changes: dict[str, str], why: str
) -> None:
    folder, _ = run_folder(root, RUN, **changes)
    with running(**tags(folder)) as worker:
        found = collect(root)
        assert found.removed == []
        assert why in found.spared[0].why
        alive = proc.read(worker)
        assert alive is not None
        assert alive.alive
    assert folder.path.exists()


def test_after_a_reboot_a_quiet_folder_goes(root: Path) -> None:
    folder, _ = run_folder(root, RUN, boot_id="another")
    for path in (folder.path, *folder.path.rglob("*")):
        os.utime(path, (1, 1))
    assert kinds(collect(root)) == [(RUN, "folder")]


def test_told_that_a_run_of_another_host_has_ended_it_clears_this_host_only(root: Path) -> None:
    folder, _ = run_folder(root, RUN, host="head-node")
    shared = memory(root, RUN)
    with running(**tags(folder)) as rank:
        assert collect(root, RUN).removed == []
        found = collect(root, RUN, ended=True)
        assert gone(rank)
    assert sorted(one for _, one in kinds(found)) == ["memory", "process"]
    assert not shared.exists()
    assert folder.path.exists()


def test_processes_without_a_record_go_only_when_their_launcher_is_seen_dead(root: Path) -> None:
    nowhere = RunFolder(root / "feed01")
    with (
        running() as launcher,
        running(**tags(nowhere, **{PARENT_PID: str(launcher)})) as child,
        running(**tags(RunFolder(root / "feed02"), **{PARENT_PID: str(2**22)})) as orphan,
        running(**tags(RunFolder(root / "feed03"), **{RUN_HOST: "head-node"})) as far,
    ):
        found = collect(root)
        assert kinds(found) == [("feed02", "process")]
        assert gone(orphan)
        assert {one.run_id for one in found.spared} == {"feed01", "feed03"}
        for pid in (child, far):
            alive = proc.read(pid)
            assert alive is not None
            assert alive.alive


def test_memory_without_a_record_goes_only_for_runs_known_to_have_ended_here(root: Path) -> None:
    unknown, known = memory(root, "aaaa00"), memory(root, "bbbb00")
    ended(root / "history" / "bbbb00", "bbbb00")
    found = collect(root)
    assert kinds(found) == [("bbbb00", "memory")]
    assert (unknown.exists(), known.exists()) == (True, False)
    assert "gc --run aaaa00 --ended" in found.spared[0].why
    assert kinds(collect(root, "aaaa00", ended=True)) == [("aaaa00", "memory")]


def test_records_of_its_dead_processes_leave_a_shared_discovery_folder(root: Path) -> None:
    shared = root.parent / "discovery"

    def record_of(worker_id: str, pid: int, started: str) -> Path:
        address = Address(host="127.0.0.1", port=1, peer_id=worker_id, incarnation=f"i{pid}")
        record = WorkerRecord(
            worker_id=worker_id,
            model="demo",
            role=Role.AGGREGATED,
            address=address,
            engine=NO_ENGINE,
            started_at_s=1.0,
        )
        owner = Owner(
            host=socket.gethostname(), machine=record_files.machine(), pid=pid, started=started
        )
        record_files.write(shared, record, owner)
        return shared / record_files.file_name(worker_id, address.incarnation)

    mine = record_of(f"{RUN}-worker-0", 2**22 - 1, "1")
    stranger = record_of("other-worker-0", 2**22 - 2, "1")
    started = record_files.process_started(os.getpid())
    assert started is not None
    alive = record_of(f"{RUN}-worker-1", os.getpid(), started)
    run_folder(root, RUN, discovery=shared.as_uri())
    assert sorted(one for _, one in kinds(collect(root))) == ["folder", "record"]
    assert [one.exists() for one in (mine, stranger, alive)] == [False, True, True]


def test_a_folder_that_never_came_to_a_record_goes_when_it_is_old(root: Path) -> None:
    folder = RunFolder(root / "half00")
    create_run(folder)
    assert collect(root).removed == []
    for path in (folder.path, *folder.path.rglob("*")):
        os.utime(path, (1, 1))
    assert kinds(collect(root)) == [("half00", "folder")]
    assert not folder.path.exists()


def test_what_belongs_to_another_user_is_left_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run_folder(root, RUN)
    shared = memory(root, RUN)
    monkeypatch.setattr(garbage, "_is_mine", lambda _path: False)
    found = collect(root)
    assert found.removed == []
    assert found.spared[0].why == "it belongs to another user"
    assert folder.path.exists()
    assert shared.exists()


def test_the_caller_and_its_parents_are_never_ended(root: Path) -> None:
    run_folder(root, RUN)
    code = (
        "import sys; from pathlib import Path; from trtllm_workers.deploy.garbage import collect_garbage;"
        "print([one.kind for one in collect_garbage(Path(sys.argv[1])).removed])"
    )
    shell = f"'{sys.executable}' -c \"{code}\" '{root}'; echo still here"
    done = subprocess.run(
        ["sh", "-c", shell],
        env={**os.environ, RUN_ID: RUN, RUN_FOLDER: str(root / RUN)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.splitlines() == ["['folder']", "still here"], done.stderr

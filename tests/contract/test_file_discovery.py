"""What discovery in a folder does beyond the contract: real deaths, full and hanging disks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.contract.planes import record, seen, soon, watching
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes import discovery_file, record_files
from trtllm_workers.planes.discovery_file import FileDiscovery
from trtllm_workers.planes.record_files import RecordFolder
from trtllm_workers.types import WorkerRecord


@pytest.fixture
async def discovery(tmp_path: Path) -> AsyncIterator[FileDiscovery]:
    made = FileDiscovery(tmp_path, ttl_s=0.6, poll_interval_s=0.02)
    yield made
    await soon(made.close())


# Deaths of real processes

WORKER = """
import asyncio, sys
from pathlib import Path
from tests.contract.planes import record
from trtllm_workers.planes.discovery_file import FileDiscovery

async def main():
    discovery = FileDiscovery(Path(sys.argv[1]), ttl_s=float(sys.argv[2]))
    await discovery.register(record("worker-0", incarnation="18e9aa"))
    print("registered", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@contextlib.contextmanager
def worker(root: Path, ttl_s: float) -> Iterator[subprocess.Popen[str]]:
    """Run a process that has registered worker-0."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root), str(ttl_s)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "registered\n"
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stdout.close()


async def test_record_of_a_killed_process_vanishes_long_before_its_ttl(tmp_path: Path) -> None:
    patient = FileDiscovery(tmp_path, ttl_s=60.0, poll_interval_s=0.02)
    with worker(tmp_path, ttl_s=60.0) as process:
        async with watching(patient) as watch:
            await seen(watch, record("worker-0", incarnation="18e9aa"))
            process.kill()  # not waited for: a zombie is dead as well
            await seen(watch)
    assert list((tmp_path / "workers").iterdir()) == []
    await soon(patient.close())


async def test_record_of_a_process_killed_before_the_watcher_came_is_not_shown(
    tmp_path: Path,
) -> None:
    with worker(tmp_path, ttl_s=60.0) as process:
        process.kill()
    patient = FileDiscovery(tmp_path, ttl_s=60.0)
    async with watching(patient) as watch:
        assert await soon(anext(watch)) == ()
    await soon(patient.close())


async def test_record_of_a_stopped_process_vanishes_and_comes_back_when_it_goes_on(
    discovery: FileDiscovery, tmp_path: Path
) -> None:
    original = record("worker-0", incarnation="18e9aa")
    with worker(tmp_path, ttl_s=0.6) as process:
        async with watching(discovery) as watch:
            await seen(watch, original)
            process.send_signal(signal.SIGSTOP)
            await seen(watch)
            process.send_signal(signal.SIGCONT)
            await seen(watch, original)


async def test_leases_end_with_their_discovery(discovery: FileDiscovery, tmp_path: Path) -> None:
    owner = FileDiscovery(tmp_path)
    original = record("worker-0")
    await owner.register(original)
    async with watching(discovery) as watch:
        await seen(watch, original)
        await soon(owner.close())
        await seen(watch)


async def test_two_deployments_do_not_see_each_other(tmp_path: Path) -> None:
    left, right = FileDiscovery(tmp_path / "left"), FileDiscovery(tmp_path / "right")
    await left.register(record("worker-0"))
    async with watching(right) as watch:
        assert await soon(anext(watch)) == ()
    await soon(left.close())
    await soon(right.close())


# Disks


class Gate:
    """Stands where a call into a hung file system would: it comes back when the gate opens."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def hang(self, *_args: object, **_named: object) -> None:
        self.reached.set()
        self._open.wait(30)

    def open(self) -> None:
        self._open.set()


async def test_files_are_for_the_owner_alone(discovery: FileDiscovery, tmp_path: Path) -> None:
    await discovery.register(record("worker-0"))
    (file,) = (tmp_path / "workers").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


async def test_register_where_nothing_can_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    discovery = FileDiscovery(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"worker-0 .*Not a directory.*file"):
        await discovery.register(record("worker-0"))
    async with watching(discovery) as watch:
        with pytest.raises(ConfigError, match="cannot read the discovery folder"):
            await soon(anext(watch))
    await soon(discovery.close())


async def test_register_on_a_full_disk_says_so_and_leaves_nothing(
    discovery: FileDiscovery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        await discovery.register(record("worker-0"))
    assert list((tmp_path / "workers").iterdir()) == []


async def test_heartbeat_that_fails_is_logged_once_and_tried_again(
    discovery: FileDiscovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = record("worker-0")
    failures = 0
    enough = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fail(_path: Path) -> None:
        nonlocal failures
        failures += 1
        if failures == 3:
            loop.call_soon_threadsafe(enough.set)
        raise OSError(errno.EIO, "Input/output error")

    with capture_logs() as logs:
        await discovery.register(original)
        async with watching(discovery) as watch:
            await seen(watch, original)
            with monkeypatch.context() as patch:
                patch.setattr(record_files, "touch", fail)
                await soon(enough.wait())
                await seen(watch)  # it vanished meanwhile
            await seen(watch, original)
    events = [log["event"] for log in logs]
    assert events.count("heartbeat failed, trying again") == 1
    assert "heartbeat works again" in events


async def test_file_that_others_removed_is_written_again(
    discovery: FileDiscovery, tmp_path: Path
) -> None:
    original = record("worker-0")
    await discovery.register(original)
    async with watching(discovery) as watch:
        await seen(watch, original)
        (file,) = (tmp_path / "workers").glob("*.json")
        file.unlink()
        await seen(watch)
        await seen(watch, original)


async def test_watcher_keeps_the_last_set_while_the_folder_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discovery = FileDiscovery(tmp_path, ttl_s=60.0, poll_interval_s=0.01)
    original = record("worker-0")
    await discovery.register(original)
    looks = 0
    enough = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fail(_view: RecordFolder) -> tuple[WorkerRecord, ...]:
        nonlocal looks
        looks += 1
        if looks == 3:
            loop.call_soon_threadsafe(enough.set)
        raise OSError(errno.ESTALE, "Stale file handle")

    with capture_logs() as logs:
        async with watching(discovery) as watch:
            await seen(watch, original)
            with monkeypatch.context() as patch:
                patch.setattr(RecordFolder, "look", fail)
                await soon(enough.wait())
            newcomer = record("worker-1")
            await discovery.register(newcomer)
            assert await soon(anext(watch)) == (original, newcomer)
    assert [log["event"] for log in logs].count("discovery folder cannot be read") == 1
    await soon(discovery.close())


async def test_file_system_that_hangs_stops_neither_the_loop_nor_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discovery = FileDiscovery(tmp_path, ttl_s=0.2, poll_interval_s=0.02)
    monkeypatch.setattr(discovery_file, "_CLOSE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(discovery_file, "_ANSWER_TIMEOUT_S", 0.1)
    hung = Gate()
    monkeypatch.setattr(os, "scandir", hung.hang)
    monkeypatch.setattr(record_files, "write", hung.hang)
    try:
        with pytest.raises(ConfigError, match=r"no answer within 0\.1 s"):
            await soon(discovery.register(record("worker-0")))
        async with watching(discovery) as watch:
            first = asyncio.ensure_future(anext(watch))
            done, _ = await asyncio.wait({first}, timeout=0.3)
            assert not done
            await soon(discovery.close())
            with pytest.raises(StopAsyncIteration):
                await soon(first)
    finally:
        hung.open()


async def test_record_is_not_brought_back_by_a_heartbeat_that_hung_during_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    discovery = FileDiscovery(tmp_path, ttl_s=0.06, poll_interval_s=0.02)
    monkeypatch.setattr(discovery_file, "_CLOSE_TIMEOUT_S", 0.05)
    hung = Gate()

    def vanish(path: Path) -> None:
        hung.hang()
        raise FileNotFoundError(path)

    monkeypatch.setattr(record_files, "touch", vanish)
    original = record("worker-0")
    await discovery.register(original)
    await soon(asyncio.to_thread(hung.reached.wait))
    with capture_logs() as logs:
        await soon(discovery.close())
    assert "the file system does not answer" in logs[-1]["reason"]
    observer = FileDiscovery(tmp_path, ttl_s=60.0, poll_interval_s=0.02)
    async with watching(observer) as watch:
        await seen(watch, original)
        hung.open()
        await seen(watch)
    assert list((tmp_path / "workers").iterdir()) == []
    await soon(observer.close())


async def test_heartbeat_that_begins_after_close_brings_nothing_back(
    discovery: FileDiscovery, tmp_path: Path
) -> None:
    lease = await discovery.register(record("worker-0"))
    await soon(lease.close())
    lease._beat_now()  # as its thread does when the lock was held until now
    assert list((tmp_path / "workers").iterdir()) == []


async def test_lease_takes_no_other_workers_record(discovery: FileDiscovery) -> None:
    lease = await discovery.register(record("worker-0"))
    with pytest.raises(
        ConfigError, match=r"lease of worker-0 .* cannot take the record of worker-1"
    ):
        await lease.update(record("worker-1"))


async def test_register_after_close_is_refused(discovery: FileDiscovery) -> None:
    await soon(discovery.close())
    with pytest.raises(ConfigError, match="closed"):
        await discovery.register(record("worker-0"))


def test_poll_interval_must_fit_the_ttl(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="poll interval"):
        FileDiscovery(tmp_path, ttl_s=1.0, poll_interval_s=1.0)

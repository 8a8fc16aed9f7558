"""Finds and clears what dead runs left on this host; says what, and what it left alone and why.

A run is dead when its launcher and its guard are, by pid and start time, where those pids count: on this
host, this boot, these pids. Whatever cannot be judged from here is left alone: runs of other hosts (their
folders may lie on a file system that hosts share), of other containers, of other users. Order: what is worth
keeping goes to the history, processes end, then memory, records and the folder go.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec

from trtllm_workers.deploy import history, proc
from trtllm_workers.deploy.end import end_processes
from trtllm_workers.deploy.parent import PARENT_PID
from trtllm_workers.deploy.run import (
    HISTORY,
    RUN_FOLDER,
    RUN_HOST,
    Run,
    RunFolder,
    RunRecord,
    find_runs,
)
from trtllm_workers.deploy.shm import left_overs, runs_with_memory
from trtllm_workers.planes import record_codec, record_files

Kind = Literal["process", "memory", "record", "socket", "folder"]

_GRACE_S = 5.0
_KILL_WAIT_S = 5.0
# Live runs touch their folders every few seconds.
_QUIET_S = 600.0
_UNFINISHED_S = 3600.0
_SHM = Path("/dev/shm")


class Garbage(msgspec.Struct, frozen=True, kw_only=True):
    """One thing of a dead run: a process by name and pid, or a path."""

    run_id: str
    kind: Kind
    what: str


class Spared(msgspec.Struct, frozen=True, kw_only=True):
    """A run that was left alone, and why."""

    run_id: str
    why: str


class Collected(msgspec.Struct, kw_only=True):
    """What was removed (with ``dry_run``: would be), what was left alone, what could not be removed."""

    dry_run: bool
    removed: list[Garbage] = []
    spared: list[Spared] = []
    left: list[Garbage] = []


def collect_garbage(
    run_dir: Path | Sequence[Path],
    run_id: str | None = None,
    *,
    dry_run: bool = False,
    ended: bool = False,
    elsewhere: bool = False,
    grace_s: float = _GRACE_S,
    shm: Path = _SHM,
) -> Collected:
    """Clear what dead runs with a folder in ``run_dir`` left on this host. Blocks, some seconds a run.

    With ``run_id`` only that run. ``ended`` is the caller's word that this run has ended, where this host
    cannot see it: another host launched it, or its record is gone. It never covers a launcher that is seen
    alive here, and the folder of another host's run stays that host's to remove. ``elsewhere``: runs whose
    folder lies outside ``run_dir`` count, too.
    """
    roots = [run_dir] if isinstance(run_dir, Path) else list(run_dir)
    collected = Collected(dry_run=dry_run)
    ended = ended and run_id is not None
    judged: set[str] = set()
    for run in _runs(roots, elsewhere=elsewhere or run_id is not None):
        if run_id not in (None, run.run_id):
            continue
        judged.add(run.run_id)
        if why := _spared(run, told_ended=ended):
            collected.spared.append(Spared(run_id=run.run_id, why=why))
        else:
            _Clearing(run, roots, collected, grace_s, shm).clear()
    _memory_alone(roots, run_id, ended, judged, collected, shm)
    if run_id is None:
        for root in roots:
            _unfinished(root, judged, collected)
    return collected


def _runs(roots: Sequence[Path], *, elsewhere: bool) -> list[Run]:
    """Return what ``find_runs`` does, and the runs of other hosts; of each what is this user's."""
    runs = {run.run_id: run for run in find_runs(roots, elsewhere=elsewhere)}
    for root in roots:
        for path in sorted(root.glob("*/run.json")):
            folder = RunFolder(path.parent)
            record = folder.read()
            if record is not None:
                runs.setdefault(record.run_id, Run(record.run_id, folder, record))
    for run in runs.values():
        run.members = {
            pid: one
            for pid, one in run.members.items()
            # Root sees everybody's; and what called this one may carry a run's tags.
            if _is_mine(Path("/proc", str(pid)))
            and not proc.is_ancestor(pid)
            and _is_of_folder(pid, run.folder)
        }
    return [run for run in runs.values() if run.folder or run.members]


def _is_of_folder(pid: int, folder: RunFolder | None) -> bool:
    """Return whether a process does not say that it belongs to another run, of the same id by chance."""
    told = proc.variables(pid).get(RUN_FOLDER)
    return folder is None or told is None or Path(told).resolve() == folder.path.resolve()


def _spared(run: Run, *, told_ended: bool) -> str:
    """Return why a run must be left alone; "" when it is dead."""
    record = run.record
    if run.folder is not None and not _is_mine(run.folder.path):
        return "it belongs to another user"
    if record is None:
        return "" if told_ended else _spared_without_record(run)
    if record.host != socket.gethostname():
        return "" if told_ended else f"it is of host {record.host}; run gc there"
    if record.boot_id != proc.boot_id():
        assert run.folder is not None
        quiet_s = time.time() - _last_written(run.folder.path)
        if quiet_s < _QUIET_S and not told_ended:
            return f"another boot of a host of this name wrote its folder {quiet_s:.0f} s ago"
        return ""
    if record.pid_namespace and record.pid_namespace != proc.pid_namespace():
        return "" if told_ended else "it is of another container of this host; run gc there"
    if run.launcher is not None:
        return f"it is alive: launcher {run.launcher.pid}"
    if record.guard and proc.same(record.guard.pid, record.guard.start_ticks):
        return f"its guard (pid {record.guard.pid}) is clearing it up"
    return ""


def _spared_without_record(run: Run) -> str:
    """Judge a run of which only processes are left, by what they carry."""
    hint = f"if it has ended: trtllm-launch gc --run {run.run_id} --ended"
    for _, member in run.members.values():
        tags = proc.variables(member.pid)
        host = tags.get(RUN_HOST, "")
        if host != socket.gethostname():
            return f"no record of it is here, and host {host or '?'} launched it; {hint}"
        told = tags.get(PARENT_PID, "")
        parent = proc.read(int(told)) if told.isdigit() else None
        # A younger process has only inherited the pid.
        if parent is not None and parent.alive and parent.start_ticks <= member.start_ticks:
            return f"its launcher (pid {parent.pid}) may live, though its record is gone; {hint}"
    return ""


class _Clearing:
    """Clears one dead run, or says what that would be."""

    def __init__(
        self, run: Run, roots: Sequence[Path], collected: Collected, grace_s: float, shm: Path
    ) -> None:
        self._run = run
        self._roots = roots
        self._collected = collected
        self._grace_s = grace_s
        self._shm = shm

    def clear(self) -> None:
        run, record = self._run, self._run.record
        folder = run.folder if record is None or record.host == socket.gethostname() else None
        dry = self._collected.dry_run
        names = {pid: f"{name} (pid {pid})" for pid, (name, _) in run.members.items()}
        still = self._end(names) if names and not dry else set()
        for pid, name in names.items():
            self._note("process", name, gone=pid not in still)
        for path in left_overs(run.run_id, folder=self._shm):
            if _is_mine(path):
                self._note("memory", str(path), gone=dry or (not still and _unlinked(path)))
        if record is not None:
            for path in _dead_records(run, record):
                self._note("record", str(path), gone=dry or _unlinked(path))
        if folder is None or still or not folder.path.is_dir():
            return
        for path in _sockets(folder.path):
            self._note("socket", str(path), gone=True)  # with the folder, below
        if not dry:
            history.keep(folder, record, "launcher died", with_logs=True)
            folder.remove()
        self._note("folder", str(folder.path), gone=dry or not folder.path.exists())

    def _end(self, names: dict[int, str]) -> set[int]:
        """End the run's processes; return the pids of those that are still there."""

        def find() -> list[proc.Proc]:
            for now in _runs(self._roots, elsewhere=True):
                if now.run_id == self._run.run_id:
                    for pid, (name, _) in now.members.items():
                        names.setdefault(pid, f"{name} (pid {pid})")
                    return [one for _, one in now.members.values()]
            return []

        return {one.pid for one in end_processes(find, self._grace_s, _KILL_WAIT_S).left}

    def _note(self, kind: Kind, what: str, *, gone: bool) -> None:
        found = Garbage(run_id=self._run.run_id, kind=kind, what=what)
        (self._collected.removed if gone else self._collected.left).append(found)


def _memory_alone(
    roots: Sequence[Path],
    run_id: str | None,
    ended: bool,
    judged: set[str],
    collected: Collected,
    shm: Path,
) -> None:
    """Clear memory of runs that have neither folder nor process any more, where they are known to be dead."""
    known = {
        path.name
        for path in history.past_runs(roots)
        if (told := history.read_ended(path)) is not None and told.host == socket.gethostname()
    }
    for one in sorted(runs_with_memory(shm) - judged):
        paths = [path for path in left_overs(one, folder=shm) if _is_mine(path)]
        if run_id not in (None, one) or not paths:
            continue
        if one not in known and not ended:
            why = (
                f"nothing says whose its memory is ({len(paths)} names in {shm}); "
                f"if it has ended: trtllm-launch gc --run {one} --ended"
            )
            collected.spared.append(Spared(run_id=one, why=why))
            continue
        for path in paths:
            gone = collected.dry_run or _unlinked(path)
            found = Garbage(run_id=one, kind="memory", what=str(path))
            (collected.removed if gone else collected.left).append(found)


def _unfinished(root: Path, judged: set[str], collected: Collected) -> None:
    """Clear folders of runs that never came to a record, an hour after anything happened in them."""
    for path in sorted(root.glob("*/status")):
        folder = RunFolder(path.parent)
        if folder.run_id in judged or folder.run_id == HISTORY or folder.read() is not None:
            continue
        if not _is_mine(folder.path) or time.time() - _last_written(folder.path) < _UNFINISHED_S:
            continue
        if not collected.dry_run:
            folder.remove(keep_logs=True)
        found = Garbage(run_id=folder.run_id, kind="folder", what=str(folder.path))
        collected.removed.append(found)


def _dead_records(run: Run, record: RunRecord) -> Iterator[Path]:
    """Yield the records that this run's processes left in a discovery folder outside its own."""
    parts = urlsplit(record.discovery)
    shared = Path(unquote(parts.path))
    if parts.scheme != "file" or (run.folder and shared.is_relative_to(run.folder.path)):
        return
    machine = record_files.machine()
    pids = {one.pid for one in record.processes}
    # A namespace other than the default has a folder of its own below.
    for path in (*shared.glob("*@*.json"), *shared.glob("*/*@*.json")):
        try:
            found = record_codec.decode(path.read_bytes())
        except (OSError, record_codec.Unreadable):
            continue
        owner = found.owner
        ours = found.record.worker_id.startswith(f"{run.run_id}-") or owner.pid in pids
        if not ours or owner.machine != machine or not _is_mine(path):
            continue
        gone = record_files.process_started(owner.pid) != owner.started
        if gone or owner.pid in run.members:
            yield path


def _sockets(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        try:
            if stat.S_ISSOCK(path.lstat().st_mode):
                yield path
        except OSError:
            continue


def _last_written(folder: Path) -> float:
    """Return when anything in a folder was written last (Unix time)."""
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        try:
            times.append(path.lstat().st_mtime)
        except OSError:
            continue
    return max(times)


def _is_mine(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except OSError:
        return False


def _unlinked(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return not path.exists()
    return True

"""A run's folder and record, and which processes belong to a run. Starts and ends nothing.

::

    <root>/<run id>/run.json       who was started: pids with start times, ports, paths
                    status/        what each process says of itself (observe/status.py)
                    logs/          one file per process, unless --log-dir says where
                    discovery/     records of live workers, unless --discovery says where
                    facts/         what each process and rank sees around it (observe/facts.py)
                    resolved.json  what the run was told (resolved.py)
           history/<run id>/       what stays of the last ended runs (history.py)

A process belongs to a run when its recorded pid and start time match, when it lives in the session
of one that does, or when its environment carries the run id (a grandchild that was left behind).
Never by name.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from trtllm_workers.deploy import proc
from trtllm_workers.errors import ConfigError

RUN_ID = "TRTLLM_LAUNCH_RUN_ID"
RUN_FOLDER = "TRTLLM_LAUNCH_RUN_FOLDER"
RUN_HOST = "TRTLLM_LAUNCH_HOST"
PROCESS = "TRTLLM_LAUNCH_PROCESS"
# What tells each rank of a world its number: MPICH's mpiexec, Open MPI's mpirun.
_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")

HISTORY = "history"
_RECORD = "run.json"
_KEPT_LOGS = 10


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a run; it leads its own session and process group, so pid is both ids.

    ``restarts`` counts how often it was started again after a death.
    """

    name: str
    role: str
    pid: int
    start_ticks: int
    log: str = ""
    restarts: int = 0


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What run.json holds. ``state`` is starting, ready or stopping.

    ``pid_namespace`` tells where its pids count; "": unknown.
    """

    run_id: str
    host: str
    boot_id: str
    started_at_s: float
    launcher: ProcessRecord
    state: str = "starting"
    model: str = ""
    url: str = ""
    http_host: str = ""
    http_port: int = 0
    discovery: str = ""
    log_dir: str = ""
    drain_timeout_s: float = 30.0
    processes: tuple[ProcessRecord, ...] = ()
    guard: ProcessRecord | None = None
    pid_namespace: str = ""

    @property
    def of_this_boot(self) -> bool:
        """Whether its pids mean anything here: same host, not rebooted since."""
        return self.host == socket.gethostname() and self.boot_id == proc.boot_id()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run: where things are, and how they are written and removed."""

    path: Path

    @property
    def run_id(self) -> str:
        """The folder is named after its run."""
        return self.path.name

    @property
    def discovery(self) -> Path:
        """Where workers register unless told otherwise."""
        return self.path / "discovery"

    @property
    def logs(self) -> Path:
        """Where logs go unless told otherwise."""
        return self.path / "logs"

    @property
    def facts(self) -> Path:
        """Where each process keeps what it sees around it."""
        return self.path / "facts"

    @property
    def resolved(self) -> Path:
        """Where it stands what the run was told."""
        return self.path / "resolved.json"

    @property
    def history(self) -> Path:
        """Where what is worth keeping goes when the run ends."""
        return self.path.parent / HISTORY / self.run_id

    def status(self, name: str) -> Path:
        """Return where the process of that name reports its steps."""
        return self.path / "status" / f"{name}.json"

    def write(self, record: RunRecord) -> None:
        """Replace run.json atomically. Raises OSError."""
        draft = self.path / f".{_RECORD}.tmp"
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        draft.replace(self.path / _RECORD)

    def read(self) -> RunRecord | None:
        """Return the record, or None when there is none that this version can read."""
        try:
            return msgspec.json.decode((self.path / _RECORD).read_bytes(), type=RunRecord)
        except (OSError, msgspec.DecodeError):
            return None

    def remove(self, *, keep_logs: bool = False) -> bool:
        """Remove the folder; return whether logs were kept (empty ones never are)."""
        keep = keep_logs and any(_size(log) for log in _children(self.logs))
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
            return False
        for child in _children(self.path):
            if child != self.logs:
                _remove(child)
        return True


def run_roots(run_dir: Path) -> list[Path]:
    """Return where runs are kept: ``run_dir``, and where they go when it cannot be written."""
    fallback = Path(tempfile.gettempdir()) / f"trtllm-launch-{os.getuid()}"
    return list(dict.fromkeys([run_dir.absolute(), fallback]))


def usable_root(run_dir: Path, *, chosen: bool) -> Path:
    """Return the folder for new runs, made if missing and readable by its owner alone.

    A ``run_dir`` that nobody ``chosen`` and that cannot be used (no home, read-only home) gives
    way to the system's temporary folder. Raises ConfigError when there is no usable place.
    """
    roots = [run_dir.absolute()] if chosen else run_roots(run_dir)
    for root in roots:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_ours(root)
        except OSError as wrong:
            trouble = f"cannot keep records of runs in {root}: {wrong.strerror or wrong}"
        else:
            return root
    raise ConfigError(f"{trouble}; choose another place with --run-dir", param="run_dir")


def new_run_id(root: Path) -> str:
    """Return an id that no run under ``root`` has: six hexadecimal digits, short enough to type."""
    while (root / (run_id := os.urandom(3).hex())).exists():
        pass
    return run_id


def create_run(folder: RunFolder) -> None:
    """Make the folder of a new run and drop the oldest logs of past ones. Raises ConfigError."""
    try:
        folder.path.mkdir(mode=0o700)
        for child in (folder.path / "status", folder.logs, folder.discovery):
            child.mkdir(mode=0o700)
    except OSError as wrong:
        raise ConfigError(
            f"cannot make the run's folder {folder.path}: {wrong.strerror or wrong}; "
            "choose another place with --run-dir",
            param="run_dir",
        ) from wrong
    _drop_old_logs(folder.path.parent)


@dataclass(slots=True)
class Run:
    """A run as found from outside: its record if there is one, and its live processes by name."""

    run_id: str
    folder: RunFolder | None
    record: RunRecord | None
    launcher: proc.Proc | None = None
    members: dict[int, tuple[str, proc.Proc]] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether anything of it still runs."""
        return self.launcher is not None or bool(self.members)


def find_runs(roots: Sequence[Path], *, elsewhere: bool = True) -> list[Run]:
    """Return every run that has a record under ``roots`` or a live process on this host.

    Without ``elsewhere`` processes of runs whose folder lies outside ``roots`` do not count. Only this user's processes can be seen. The calling process is in no run.
    """
    runs: dict[str, Run] = {}
    for root in roots:
        for path in _children(root):
            folder = RunFolder(path)
            record = folder.read()
            # A home may be shared by hosts: other hosts' runs are theirs to show and to stop.
            if record is not None and record.host == socket.gethostname():
                runs[record.run_id] = Run(record.run_id, folder, record)
    live = [process for process in proc.everyone() if process.pid != os.getpid()]
    for process in live:
        tags = proc.variables(process.pid)
        run_id = tags.get(RUN_ID)
        if run_id and (elsewhere or run_id in runs or _lies_under(roots, tags)):
            run = runs.setdefault(run_id, _unrecorded(run_id, tags))
            name = tags.get(PROCESS, "unnamed")
            rank = rank_of(tags)
            run.members[process.pid] = (
                name if rank is None else f"{name} rank {rank}",
                process,
            )
    for run in runs.values():
        if run.record is not None and run.record.of_this_boot:
            _add_recorded(run, run.record, live)
    return sorted(runs.values(), key=lambda run: run.record.started_at_s if run.record else 0.0)


def ranks_of(run_id: str, process: str) -> dict[int, proc.Proc]:
    """Return the live ranks of one process of a run that is an MPI world, by rank."""
    found: dict[int, proc.Proc] = {}
    for one in members_of(run_id):
        tags = proc.variables(one.pid)
        rank = rank_of(tags)
        if tags.get(PROCESS) != process or rank is None:
            continue
        # A rank's own children carry its number too, and are younger.
        if rank not in found or one.start_ticks < found[rank].start_ticks:
            found[rank] = one
    return found


def rank_of(tags: Mapping[str, str]) -> int | None:
    """Return a process's number in its world; None for one that is in none."""
    numbers = [tags[name] for name in _RANKS if tags.get(name, "").isdigit()]
    return int(numbers[0]) if numbers else None


def of_process(run_id: str, process: str) -> list[proc.Proc]:
    """Return the live processes of a run that one planned process started, its own included."""
    return [one for one in members_of(run_id) if proc.variables(one.pid).get(PROCESS) == process]


def members_of(run_id: str) -> list[proc.Proc]:
    """Return the live processes whose environment carries that run id, the caller excepted."""
    return [
        process
        for process in proc.everyone()
        if process.pid != os.getpid() and proc.variables(process.pid).get(RUN_ID) == run_id
    ]


def _add_recorded(run: Run, record: RunRecord, live: Iterable[proc.Proc]) -> None:
    run.launcher = proc.same(record.launcher.pid, record.launcher.start_ticks)
    if run.launcher is not None:
        run.members.pop(run.launcher.pid, None)
    sessions = {}
    for one in record.processes:
        # Only a live leader proves that the session id is still the one that was recorded.
        if found := proc.same(one.pid, one.start_ticks):
            sessions[found.pid] = one.name
            run.members[found.pid] = (one.name, found)
    for process in live:
        if process.session in sessions and process.pid not in run.members:
            run.members[process.pid] = (sessions[process.session], process)


def _lies_under(roots: Sequence[Path], tags: Mapping[str, str]) -> bool:
    folder = tags.get(RUN_FOLDER)
    return folder is not None and Path(folder).parent in roots


def _unrecorded(run_id: str, tags: Mapping[str, str]) -> Run:
    """Make a run known by its processes alone; its folder, if it still is there, is theirs to say."""
    folder = RunFolder(Path(tags[RUN_FOLDER])) if tags.get(RUN_FOLDER) else None
    if folder is None or folder.run_id != run_id or not folder.path.is_dir():
        return Run(run_id, None, None)
    return Run(run_id, folder, folder.read())


def _require_ours(root: Path) -> None:
    # In a shared temporary folder somebody else may have made it first, to read or replace files.
    if root.stat().st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "it belongs to somebody else")
    if not os.access(root, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it cannot be written")


def _drop_old_logs(root: Path) -> None:
    """Remove the oldest kept logs of failed runs; run folders with a record are left alone."""
    kept = [path for path in _children(root) if (path / "logs").is_dir()]
    past = [path for path in kept if not (path / _RECORD).exists() and not _has_live(path)]
    past.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in past[_KEPT_LOGS:]:
        shutil.rmtree(path, ignore_errors=True)


def _has_live(path: Path) -> bool:
    # A run that is being created has these two folders and no record yet.
    return (path / "status").is_dir() or (path / "discovery").is_dir()


def _children(path: Path) -> list[Path]:
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()

"""Worker records as files in a folder: written, read, judged alive or dead. Blocking; no loop.

One file per life of a worker, ``<worker_id>@<incarnation>.json``, replaced by rename. Its mtime is
the heartbeat. What the numbers of the mtime are does not matter, only that they change: the clocks
of hosts that share the folder need not agree.

::

    seen ──mtime changes──▶ alive ──no change for ttl──▶ silent ──10 × ttl──▶ file removed
      │                       ▲                            │
      └─ believed for ttl ────┴────────mtime changes───────┘
    its process is of this host and gone: dead and removed at once

A record met for the first time is believed until ttl has passed without a heartbeat: a watcher
that has just started sees all workers at once, and at worst a dead one of another host for one ttl.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import structlog

from trtllm_workers.planes import record_codec
from trtllm_workers.planes.record_codec import Owner, RecordFile, Unreadable
from trtllm_workers.types import WorkerRecord

_SUFFIX = ".json"
_REMOVE_AFTER_TTLS = 10

log = structlog.get_logger(__name__)


def file_name(worker_id: str, incarnation: str) -> str:
    """Return the name of a life's file; ids of any characters are safe in it."""
    return f"{_quoted(worker_id)}@{_quoted(incarnation)}{_SUFFIX}"


def _quoted(part: str) -> str:
    return quote(part, safe="").replace(".", "%2E")  # no leading dot: those are unfinished files


def write(folder: Path, record: WorkerRecord, owner: Owner) -> None:
    """Write a record's file, so that a reader sees the old one or the new one. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / file_name(record.worker_id, record.address.incarnation)
    unfinished = folder / f".{path.name}.{secrets.token_hex(4)}"
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(record_codec.encode(record, owner))
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def touch(path: Path) -> None:
    """Move a file's heartbeat. Needs no disk space. Raises OSError."""
    os.utime(path)


def machine() -> str:
    """Return what two processes share exactly when each can see the other's pid; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_started(pid: int) -> str | None:
    """Return when a process of this machine started, in kernel ticks; None when it is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = after_name[0], after_name[19]
    return None if state in "ZX" else started  # a zombie serves nobody


def this_process(host: str) -> Owner:
    """Return the owner of records this process writes."""
    pid = os.getpid()
    return Owner(host=host, machine=machine(), pid=pid, started=process_started(pid) or "")


@dataclass(slots=True)
class _Sighting:
    """What is known of one file. ``stamp`` (mtime, inode) changes with heartbeat and content."""

    changed_s: float
    stamp: tuple[int, int] = (0, 0)
    content: RecordFile | None = None


class RecordFolder:
    """Looks at a folder again and again and says which records are alive.

    Cheap when nothing changed: a directory listing, and an open and a stat for each file. With a
    ``worker_id`` it looks at that worker's files only. ``clock`` is monotonic, in seconds. Not safe
    for two threads at once.
    """

    def __init__(
        self,
        folder: Path,
        ttl_s: float,
        worker_id: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._prefix = "" if worker_id is None else f"{_quoted(worker_id)}@"
        self._clock = clock
        self._machine = machine()
        self._seen: dict[str, _Sighting] = {}
        self._skipped: set[str] = set()
        self._looked_s: float | None = None

    def look(self) -> tuple[WorkerRecord, ...]:
        """Return the live records, the youngest life of each worker, sorted by worker_id.

        A folder that does not exist yet holds none. Raises OSError when it cannot be read.
        """
        try:
            with os.scandir(self._folder) as entries:
                names = [entry.name for entry in entries if self._concerns_us(entry.name)]
        except FileNotFoundError:
            names = []
        now_s = self._clock()
        self._forgive_a_pause(now_s)
        for gone in self._seen.keys() - set(names):
            del self._seen[gone]
        self._skipped.intersection_update(names)
        live: dict[str, WorkerRecord] = {}
        for name in names:
            record = self._live_record(name, now_s)
            if record is not None:
                other = live.get(record.worker_id)
                if other is None or other.address.incarnation < record.address.incarnation:
                    live[record.worker_id] = record
        return tuple(live[worker_id] for worker_id in sorted(live))

    def _concerns_us(self, name: str) -> bool:
        if name.startswith("."):
            return f"{_SUFFIX}." in name and not self._prefix
        return name.endswith(_SUFFIX) and name.startswith(self._prefix)

    def _forgive_a_pause(self, now_s: float) -> None:
        """Do not hold against the owners what was missed while nobody looked.

        The folder hung or could not be read, or this process stood still.
        """
        if self._looked_s is not None and now_s - self._looked_s > self._ttl_s / 2:
            for sighting in self._seen.values():
                sighting.changed_s += now_s - self._looked_s
        self._looked_s = now_s

    def _live_record(self, name: str, now_s: float) -> WorkerRecord | None:
        """Return a file's record if it is alive; remove the file if it has been dead for long."""
        seen = self._seen.setdefault(name, _Sighting(now_s))
        try:
            self._refresh(name, seen, now_s)
        except FileNotFoundError:
            del self._seen[name]
            return None
        except OSError as error:
            if seen.content is None:
                self._skip(name, str(error.strerror or error))
        silent_s = now_s - seen.changed_s
        dead = seen.content is not None and self._owner_is_gone(seen.content.owner)
        is_ours = seen.content is not None or name.startswith(".")
        if dead or (is_ours and silent_s > self._ttl_s * _REMOVE_AFTER_TTLS):
            self._remove(name, "its process is gone" if dead else f"silent for {silent_s:.0f} s")
            return None
        if seen.content is None or silent_s > self._ttl_s:
            return None
        return seen.content.record

    def _refresh(self, name: str, seen: _Sighting, now_s: float) -> None:
        """Read a file again if it changed. Raises OSError."""
        # Opened, not only looked at: on NFS an open asks the server, a stat may answer from a cache
        # that is older than a heartbeat.
        with (self._folder / name).open("rb") as file:
            status = os.fstat(file.fileno())
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp != seen.stamp:
                seen.stamp, seen.changed_s = stamp, now_s
                if not name.startswith("."):
                    seen.content = self._parse(name, file.read())

    def _parse(self, name: str, text: bytes) -> RecordFile | None:
        try:
            content = record_codec.decode(text)
        except Unreadable as error:
            self._skip(name, str(error))
            return None
        record = content.record
        if file_name(record.worker_id, record.address.incarnation) != name:
            self._skip(name, f"it holds the record of {record.worker_id}: a copy?")
            return None
        self._skipped.discard(name)
        return content

    def _owner_is_gone(self, owner: Owner) -> bool:
        if not owner.machine or owner.machine != self._machine:
            return False
        return process_started(owner.pid) != owner.started

    def _skip(self, name: str, reason: str) -> None:
        if name not in self._skipped:
            self._skipped.add(name)
            log.warning("worker record skipped", file=str(self._folder / name), reason=reason)

    def _remove(self, name: str, reason: str) -> None:
        self._seen.pop(name, None)
        with contextlib.suppress(OSError):  # gone already, or not ours to remove
            (self._folder / name).unlink()
            log.info("dead worker record removed", file=name, reason=reason)

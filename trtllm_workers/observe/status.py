"""A process tells its launcher how far it has come, in a small file. Knows no launcher.

::

    starting ──▶ model n % ──▶ registering ──▶ registered ──▶ draining      a worker
    starting ──▶ listening ──▶ draining                                     the ingress
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Literal

import msgspec

Step = Literal["starting", "model", "registering", "registered", "listening", "draining"]

# Loading reports every tensor; a reader that looks ten times a second gains nothing from more.
_SMALLEST_ADVANCE = 0.01


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one process said last.

    ``done`` is the share of the step, 0 to 1, where the step can tell. ``since`` is when the step
    began (Unix time, seconds). ``detail`` is for people, except that ``listening`` says the URL.
    """

    step: str
    since: float
    done: float | None = None
    detail: str = ""


class StatusFile:
    """Reports steps to ``path``; without a path it does nothing. Safe from any thread.

    Each report replaces the file atomically. A report that cannot be written (full disk, folder
    gone) is dropped: a process must not fail because nobody can watch it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._last: Status | None = None

    def report(self, step: Step, *, done: float | None = None, detail: str = "") -> None:
        """Say that ``step`` has begun, or how much of it is done (0 to 1)."""
        if self._path is None:
            return
        with self._lock:
            last = self._last
            same_step = last is not None and last.step == step
            since = last.since if last is not None and same_step else time.time()
            status = Status(step=step, since=since, done=done, detail=detail)
            if last is not None and same_step and not _worth_writing(last, status):
                return
            self._last = status
            try:
                _replace(self._path, msgspec.json.encode(status))
            except OSError:
                self._last = last  # the next report tries again


def read_status(path: Path) -> Status | None:
    """Return what a process reported last, or None when there is nothing readable (yet)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        return None


def _worth_writing(last: Status, status: Status) -> bool:
    if status.detail != last.detail or (status.done is None) != (last.done is None):
        return True
    if status.done is None or last.done is None:
        return False
    finished = status.done >= 1.0 and last.done < 1.0
    return finished or abs(status.done - last.done) >= _SMALLEST_ADVANCE


def _replace(path: Path, content: bytes) -> None:
    # Next to its target, so that the rename stays within one file system.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_bytes(content)
    draft.replace(path)

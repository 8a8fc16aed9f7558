"""A process tells its launcher how far it has come, in a small file. Knows no launcher.

::

    starting ──▶ model n % ──▶ registering ──▶ registered ──▶ draining      a worker
                                    └──▶ pairing ──▶┘                       only a decode worker
    starting ──▶ listening ──▶ draining                                     the ingress
    starting ──▶ following                                                  a rank beside the leader
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

Step = Literal[
    "starting",
    "model",
    "registering",
    "pairing",
    "registered",
    "listening",
    "draining",
    "following",
]

# Loading reports every tensor; a reader that looks ten times a second gains nothing from more.
_SMALLEST_ADVANCE = 0.01

# A pair counts every handoff; a file written for each would cost more than it tells.
_COUNTS_EVERY_S = 1.0


class PairStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a decode worker says of one prefill worker it takes KV blocks from.

    ``transport`` is what was asked for and agreed on (``ucx``, ``nixl``, ``tcp``), ``wire`` what
    carries the bytes (``cuda_ipc``, ``rc``, ``tcp``, ``shm``). ``state`` is ``checking``,
    ``ready``, ``refused``, ``mismatch`` or ``lost``; ``reason`` says why it is not ``ready``.
    """

    peer: str
    transport: str
    wire: str
    state: str
    gb_per_s: float = 0.0
    num_handoffs: int = 0
    reason: str = ""


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one process said last.

    ``done`` is the share of the step, 0 to 1, where the step can tell. ``since`` is when the step
    began (Unix time, seconds). ``detail`` is for people, except that ``listening`` says the URL.
    ``pairs`` is what a decode worker last said of its prefill workers.
    """

    step: str
    since: float
    done: float | None = None
    detail: str = ""
    pairs: tuple[PairStatus, ...] = ()


class StatusFile:
    """Reports steps to ``path``; without a path it does nothing. Safe from any thread.

    Each report replaces the file atomically. A report that cannot be written (full disk, folder
    gone) is dropped: a process must not fail because nobody can watch it.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._last: Status | None = None
        self._pairs: tuple[PairStatus, ...] = ()
        self._counts_at = float("-inf")  # when the counts of pairs were last written

    def report(self, step: Step, *, done: float | None = None, detail: str = "") -> None:
        """Say that ``step`` has begun, or how much of it is done (0 to 1)."""
        with self._lock:
            last = self._last
            same_step = last is not None and last.step == step
            since = last.since if last is not None and same_step else time.time()
            status = Status(step=step, since=since, done=done, detail=detail, pairs=self._pairs)
            if last is not None and same_step and not _worth_writing(last, status):
                return
            self._write(status)

    def report_pairs(self, pairs: Sequence[PairStatus]) -> None:
        """Say how the pairs of this decode worker are; the step stays as it is.

        A pair that came, went or changed its state is written at once; figures that only grew are
        written once a second, so that this may be called after every handoff.
        """
        with self._lock:
            last = self._last or Status(step="starting", since=time.time())
            self._pairs = new = tuple(pairs)
            if new == last.pairs:
                return
            now = self._clock()
            only_counts = [_without_counts(pair) for pair in new] == [
                _without_counts(pair) for pair in last.pairs
            ]
            if only_counts and now - self._counts_at < _COUNTS_EVERY_S:
                return
            if self._write(msgspec.structs.replace(last, pairs=new)):
                self._counts_at = now

    def _write(self, status: Status) -> bool:
        """Replace the file; on failure forget ``status``, so that the next report tries again."""
        if self._path is None:
            return False
        try:
            _replace(self._path, msgspec.json.encode(status))
        except OSError:
            return False
        self._last = status
        return True


def rank_status(path: Path, rank: int) -> Path:
    """Return where a rank beside the leader reports, given where the leader does."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")


def read_status(path: Path) -> Status | None:
    """Return what a process reported last, or None when there is nothing readable (yet)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Status)
    except (OSError, msgspec.DecodeError):
        return None


def _without_counts(pair: PairStatus) -> PairStatus:
    return msgspec.structs.replace(pair, gb_per_s=0.0, num_handoffs=0)


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

"""What the processes of a run write: to their log files, and to the terminal line by line.

Knows no process. A slow terminal never slows a process down, and a full disk never stops one.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

TAIL_LINES = 20
_MAX_LINE_BYTES = 16 * 1024
_MAX_WAITING_LINES = 10_000
_MAX_LOG_BYTES = 64 * 1024 * 1024
_COLOURS = (36, 33, 35, 32, 34, 31)
# Everything that could move the cursor or retitle the window; colours (ESC [ … m) may pass.
_CONTROL = re.compile(r"\x1b\[[0-9;]*m|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Lines:
    """Bytes as they come → whole lines. Carriage returns end a line too (progress bars)."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """What has come since the last line's end."""
        return self._rest

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that are complete now; a line longer than 16 KiB comes in pieces."""
        *whole, self._rest = (self._rest + chunk).replace(b"\r", b"\n").split(b"\n")
        lines = [piece for line in whole if line for piece in _pieces(line)]
        while len(self._rest) > _MAX_LINE_BYTES:
            lines.append(self._rest[:_MAX_LINE_BYTES])
            self._rest = self._rest[_MAX_LINE_BYTES:]
        return lines

    def finish(self) -> list[bytes]:
        """Return what is left without a line's end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def _pieces(line: bytes) -> list[bytes]:
    return [line[at : at + _MAX_LINE_BYTES] for at in range(0, len(line), _MAX_LINE_BYTES)]


def printable(line: bytes) -> str:
    """Return a line for the terminal: invalid UTF-8 and control characters are shown, not obeyed."""
    text = line.decode("utf-8", "backslashreplace").rstrip()
    return _CONTROL.sub(_show, text)


def _show(match: re.Match[str]) -> str:
    found = match.group()
    return found if len(found) > 1 else f"\\x{ord(found):02x}"


class LogFile:
    """One process's log on disk, as raw bytes; at 64 MiB it becomes ``NAME.1`` and starts anew.

    ``on_trouble`` is told once why writing fails. Each later write tries again, so the log goes on
    when there is room again; nothing is ever raised.
    """

    def __init__(
        self, path: Path, on_trouble: Callable[[str], None], max_bytes: int = _MAX_LOG_BYTES
    ) -> None:
        self.path = path
        self._on_trouble = on_trouble
        self._max_bytes = max_bytes
        self._told = False
        self._fd: int | None = None
        self._size = 0

    def write(self, chunk: bytes) -> None:
        """Append; blocks no longer than the file system does."""
        try:
            if self._fd is None:
                self._open()
            elif self._size + len(chunk) > self._max_bytes:
                self._turn_over()
            view = memoryview(chunk)
            while view and self._fd is not None:
                written = os.write(self._fd, view)
                self._size += written
                view = view[written:]
        except OSError as wrong:
            if not self._told:
                self._told = True
                self._on_trouble(f"cannot write {self.path}: {wrong.strerror or wrong}")

    def close(self) -> None:
        """Close the file; safe twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _turn_over(self) -> None:
        if not self.path.is_file():  # a device or a pipe has no size to keep small
            return
        self.close()
        self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        self._open()


class Terminal:
    """Writes lines to a file descriptor from a thread of its own.

    When the reader is slow, lines wait; beyond 10 000 the newest are dropped and counted. When the
    reader is gone, lines are dropped in silence: the run goes on, and logs are on disk.
    """

    def __init__(self, fd: int, *, colour: bool = False, names: Sequence[str] = ()) -> None:
        self._fd = fd
        self._colour = colour
        self._names = list(names)
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name="terminal", daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """Write a message of the launcher itself; may hold several lines."""
        self._put(text)

    def line(self, name: str, text: str) -> None:
        """Write one line of the process of that name."""
        prefix = f"[{name}]"
        if self._colour:
            whose = name.partition("/")[0]
            at = self._names.index(whose) if whose in self._names else 0
            prefix = f"\x1b[{_COLOURS[at % len(_COLOURS)]}m{prefix}\x1b[0m"
        self._put(f"{prefix} {text}")

    def close(self, timeout_s: float = 2.0) -> None:
        """Wait until everything is written, at most ``timeout_s``, and end the thread."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._changed.wait_for(lambda: not self._lines and not self._busy, timeout_s)
            self._closed = True
            self._changed.notify_all()
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _put(self, text: str) -> None:
        with self._changed:
            if len(self._lines) >= _MAX_WAITING_LINES:
                self._dropped += 1
                return
            self._lines.append(text)
            self._changed.notify_all()

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._lines) or self._closed)
                if not self._lines:
                    return
                self._busy = True
                lines = list(self._lines)
                self._lines.clear()
                if self._dropped:
                    lines.append(f"({self._dropped} lines not shown: the terminal is slow)")
                    self._dropped = 0
            try:
                # Not through sys.stdout: its lock would be held when the reader never reads.
                self._write(
                    "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
                )
            except OSError:
                continue  # nobody reads; keep taking lines so that nobody waits

    def _write(self, text: bytes) -> None:
        view = memoryview(text)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # somebody else made this descriptor non-blocking
                select.select([], [self._fd], [])


class Output:
    """One process's output: into its log, onto the terminal, and the last lines kept for a report."""

    def __init__(self, name: str, log: LogFile, terminal: Terminal) -> None:
        self.name = name
        self.log = log
        self._terminal = terminal
        self._lines = Lines()
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def feed(self, chunk: bytes) -> None:
        """Take bytes as they come from the process."""
        self.log.write(chunk)
        self._show_all(self._lines.feed(chunk))

    def finish(self) -> None:
        """Take the process's end: a last line without an end is shown too."""
        self._show_all(self._lines.finish())
        self.log.close()

    def tail(self) -> list[str]:
        """Return the last lines, at most 20, the unfinished one included."""
        rest = printable(self._lines.rest)
        return [*self._tail, rest][-TAIL_LINES:] if rest else list(self._tail)

    def _show_all(self, lines: list[bytes]) -> None:
        for line in lines:
            text = printable(line)
            self._tail.append(text)
            self._terminal.line(self.name, text)


_LABEL = re.compile(r"^ *(\d+): ?(.*)$", re.DOTALL)


class RankedOutput(Output):
    """The output of a step of several ranks, each line with its rank in front (``srun --label``).

    Each rank's lines go into a log of its own, ``NAME.rank3.log``; what srun itself says stays in the
    step's. ``tail_of`` has the last lines of one rank.
    """

    def __init__(
        self, name: str, log: LogFile, terminal: Terminal, open_log: Callable[[Path], LogFile]
    ) -> None:
        super().__init__(name, log, terminal)
        self._open_log = open_log
        self._ranks: dict[int, tuple[LogFile, deque[str]]] = {}

    def feed(self, chunk: bytes) -> None:
        """Take bytes as they come from srun."""
        self._show_all(self._lines.feed(chunk))

    def finish(self) -> None:
        """Take the step's end."""
        super().finish()
        for log, _ in self._ranks.values():
            log.close()

    def tail_of(self, rank: int) -> list[str]:
        """Return the last lines of a rank, at most 20."""
        return list(self._ranks[rank][1]) if rank in self._ranks else []

    def log_of(self, rank: int) -> Path:
        """Return where a rank's lines go."""
        return rank_log(self.log.path, rank)

    def _show_all(self, lines: list[bytes]) -> None:
        for line in lines:
            text = printable(line)
            labelled = _LABEL.match(text)
            if labelled is None:
                self.log.write(line + b"\n")
                self._tail.append(text)
                self._terminal.line(self.name, text)
                continue
            rank, rest = int(labelled[1]), labelled[2]
            if rank not in self._ranks:
                self._ranks[rank] = (self._open_log(self.log_of(rank)), deque(maxlen=TAIL_LINES))
            log, tail = self._ranks[rank]
            log.write(line.partition(b":")[2].removeprefix(b" ") + b"\n")
            tail.append(rest)
            self._tail.append(rest)
            self._terminal.line(f"{self.name}/{rank}", rest)


def rank_log(log: Path, rank: int) -> Path:
    """Return the log of one rank beside the step's own."""
    return log.with_name(f"{log.stem}.rank{rank}{log.suffix}")

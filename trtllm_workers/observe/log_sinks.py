"""Where log lines go, and what happens when they cannot. Knows no format.

A sink never raises. A line that cannot be written (full disk, closed pipe) is dropped and counted;
when writing works again, one line says how many were lost.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path


class Sink:
    """Whole lines to a file descriptor, without a buffer that could fail later.

    ``open_fd`` is called again after a failure when ``reopen`` is true: a folder may come back.
    """

    def __init__(self, open_fd: Callable[[], int], *, reopen: bool) -> None:
        self.dropped = 0
        self.reason = ""
        self._open_fd = open_fd
        self._reopen = reopen
        self._fd: int | None = None
        self._torn = False

    @property
    def is_failing(self) -> bool:
        return self.dropped > 0

    def write(self, line: str) -> bool:
        """Write one line; return False when it was dropped."""
        content = line.encode("utf-8", "backslashreplace") + b"\n"
        try:
            if self._fd is None:
                self._fd = self._open_fd()
            # A line that broke off half-way must not swallow the beginning of this one.
            self._write_all(b"\n" + content if self._torn else content)
        except OSError as error:
            self.dropped += 1
            self.reason = error.strerror or str(error)
            if self._reopen:
                self.close()
            return False
        return True

    def forget_dropped(self) -> None:
        self.dropped = 0

    def close(self) -> None:
        """Close the descriptor if it is ours; safe twice."""
        if self._fd is not None and self._reopen:
            fd, self._fd = self._fd, None
            try:
                os.close(fd)
            except OSError as error:  # NFS reports a full disk here
                self.reason = error.strerror or str(error)

    def _write_all(self, content: bytes) -> None:
        assert self._fd is not None
        rest = memoryview(content)
        while rest:
            written = os.write(self._fd, rest)
            rest = rest[written:]
            self._torn = bool(rest)


def stderr_sink() -> Sink:
    """Return a sink for standard error; the descriptor is not ours to close.

    Only for a process that has one: with stderr closed at start, descriptor 2 may be a socket.
    """
    return Sink(lambda: 2, reopen=False)


def file_sink(path: Path) -> Sink:
    """Return a sink that appends to ``path``; folders are made, readable by their owner alone."""

    def open_fd() -> int:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    return Sink(open_fd, reopen=True)


class SinkHandler(logging.Handler):
    """A logging handler over a sink: whatever goes wrong, the caller of the log does not notice."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        line = self._formatted(record)
        sink = self.sink
        if sink.is_failing:
            note = _note("log lines were dropped: %d (%s)", sink.dropped, sink.reason)
            if not sink.write(self._formatted(note)):
                return  # this line is lost as well, and counted in place of the note
            sink.forget_dropped()
        sink.write(line)

    def close(self) -> None:
        self.sink.close()
        super().close()

    def _formatted(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # noqa: BLE001 - a value that cannot be shown must not stop the work
            # structlog hands over its fields as a dict; naming one of those could fail again.
            text = record.msg[:200] if isinstance(record.msg, str) else "not shown"
            why = type(error).__name__
            return self.format(
                _note("a log line of %s could not be formatted (%s): %r", record.name, why, text)
            )


def _note(text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord(__name__, logging.WARNING, "", 0, text, args, None)

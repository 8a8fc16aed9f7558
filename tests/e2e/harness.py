"""Starts the real command line in real processes and ends them. Holds no test."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from trtllm_workers.demo import demo_model_path

START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0
COMMAND = [sys.executable, "-m", "trtllm_workers.cli.main"]
DEMO = demo_model_path()
SIM_COSTS = Path(__file__).resolve().parents[2] / "engine_configs" / "sim"


class Process:
    """One started command: its lines as they come, and its end."""

    def __init__(self, argv: list[str], environ: dict[str, str], cwd: Path) -> None:
        self.lines: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        self._ended = False
        self.popen = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environ,
            cwd=cwd,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as stdout:
            for line in stdout:
                self._news.put(line.rstrip("\n"))
        self._news.put(None)

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_line(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """Return the first match of ``pattern`` in a line, old or new; fail with the whole output."""
        for line in self.lines:
            if found := re.search(pattern, line):
                return found
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line_or_end = self._take(max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"no line /{pattern}/ within {timeout_s} s:\n{self.output}"
                ) from None
            if line_or_end is None:
                raise AssertionError(f"ended without a line /{pattern}/:\n{self.output}")
            if found := re.search(pattern, line_or_end):
                return found

    def wait_end(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Return the exit code; ``output`` is whole then."""
        code = self.popen.wait(timeout_s)
        while not self._ended:
            self._take(END_TIMEOUT_S)
        self._reader.join(END_TIMEOUT_S)
        return code

    def _take(self, timeout_s: float) -> str | None:
        """Take one line; None when there are no more. Raises queue.Empty when none comes in time."""
        line = self._news.get(timeout=timeout_s)
        if line is None:
            self._ended = True
        else:
            self.lines.append(line)
        return line

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)


class Workbench:
    """A place for runs of one test: its own run directory, and nothing left behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_dir = path / "runs"
        self.started: list[Process] = []
        keep = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
        self.environ = {name: os.environ[name] for name in keep if name in os.environ}
        self.environ["RUN_DIR"] = str(self.run_dir)
        self.tag = f"bench-{path.name}"
        self.environ["TRTLLM_LAUNCH_TEST"] = self.tag

    def start(self, *args: str, **environ: str) -> Process:
        process = Process([*COMMAND, *args], {**self.environ, **environ}, self.path)
        self.started.append(process)
        return process

    def run(self, *args: str, **environ: str) -> Process:
        """Start a command and wait for its end; ``popen.returncode`` tells how."""
        process = self.start(*args, **environ)
        process.wait_end()
        return process

    def up(self, *args: str, **environ: str) -> tuple[Process, str]:
        """Start a run on a free port; return it and its base URL once it is ready."""
        process = self.start("up", "--http-port", "0", *args, **environ)
        url = process.wait_line(r"^ready after .* at (http://\S+)/v1$").group(1)
        return process, url

    def survivors(self) -> dict[int, str]:
        """Return every process that carries this bench's mark in its environment."""
        found: dict[int, str] = {}
        mark = f"TRTLLM_LAUNCH_TEST={self.tag}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                    if state != "Z":
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                        found[int(entry.name)] = command.decode(errors="replace")
        return found

    def wait_empty(self, timeout_s: float = END_TIMEOUT_S) -> None:
        """Wait until no process of this bench is left; there is no event for strangers' deaths."""
        deadline = time.monotonic() + timeout_s
        while left := self.survivors():
            assert time.monotonic() < deadline, f"still alive: {left}"
            threading.Event().wait(0.05)

    def pid_of(self, name: str) -> int:
        """Return the pid of a part of the only run, as ``ps`` tells it."""
        listed = self.run("ps")
        found = re.search(rf"^\S+\s+{name}\s+(\d+)", listed.output, flags=re.MULTILINE)
        assert found, listed.output
        return int(found.group(1))


@contextlib.contextmanager
def workbench(path: Path) -> Iterator[Workbench]:
    bench = Workbench(path)
    try:
        yield bench
    finally:
        for process in bench.started:
            if process.popen.poll() is None:
                process.signal(signal.SIGTERM)
        for process in bench.started:
            try:
                process.popen.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.popen.kill()
        for pid in bench.survivors():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in bench.started:
            process.wait_end()

"""Starts launchers in processes of their own and waits for what they say, with deadlines."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.config.engine_config import parse_override
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy import proc

HERE = Path(__file__).parent
DEADLINE_S = 20.0
# A stand-in needs the standard library only; -S makes it start in a few milliseconds.
FAKE_PART = (sys.executable, "-S", str(HERE / "fake_part.py"))


@dataclass
class Launch:
    """A launcher in a process of its own, and what it has written so far."""

    popen: subprocess.Popen[str]
    folder: Path
    lines: list[str] = field(default_factory=list)
    _fresh: queue.Queue[str | None] = field(default_factory=queue.Queue)

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def read_forever(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._fresh.put(line.rstrip("\n"))
        self._fresh.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Return the first line, past or to come, that holds ``pattern``."""
        for line in self.lines:
            if found := re.search(pattern, line):
                return found
        deadline = time.monotonic() + DEADLINE_S
        while (left := deadline - time.monotonic()) > 0:
            try:
                fresh = self._fresh.get(timeout=left)
            except queue.Empty:
                break
            assert fresh is not None, f"the launcher ended without {pattern!r}:\n{self.text}"
            self.lines.append(fresh)
            if found := re.search(pattern, fresh):
                return found
        raise AssertionError(f"no line with {pattern!r} in time:\n{self.text}")

    def wait(self) -> int:
        """Wait for the launcher's end and take its last lines; return its exit code."""
        code = self.popen.wait(DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while (fresh := self._fresh.get(timeout=deadline - time.monotonic())) is not None:
            self.lines.append(fresh)
        return code


@contextmanager
def launched(argv: list[str], folder: Path, env: Mapping[str, str]) -> Iterator[Launch]:
    """Start ``argv`` with both output streams as one; whatever is left at the end is ended."""
    popen = subprocess.Popen(
        argv,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        start_new_session=True,
    )
    launch = Launch(popen, folder)
    reader = threading.Thread(target=launch.read_forever, daemon=True)
    reader.start()
    try:
        yield launch
    finally:
        if popen.poll() is None:
            popen.kill()
            popen.wait(DEADLINE_S)
        # The guard holds the same pipe; its end is the end of everything.
        reader.join(DEADLINE_S)
        assert not reader.is_alive(), "something of the run still holds its output"
        assert popen.stdout is not None
        popen.stdout.close()


@contextmanager
def launched_fakes(
    root: Path,
    worker: tuple[str, ...] = (),
    ingress: tuple[str, ...] = (),
    *,
    run_id: str = "abc123",
    argv: Mapping[str, list[str]] | None = None,
    **spec: Any,
) -> Iterator[Launch]:
    """Start a launcher with one fake worker and one fake ingress that behave as told."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / run_id
    status = folder / "status"
    processes = {
        "worker-0": [*FAKE_PART, "worker", str(status / "worker-0.json"), *worker],
        "ingress": [*FAKE_PART, "ingress", str(status / "ingress.json"), *ingress],
        **(argv or {}),
    }
    plan = root / f"{run_id}-plan.json"
    plan.write_text(json.dumps({"folder": str(folder), "processes": processes, **spec}))
    command = [sys.executable, str(HERE / "drive.py"), str(plan)]
    with launched(command, folder, os.environ) as launch:
        yield launch


def gone(pid: int, timeout_s: float = DEADLINE_S) -> bool:
    """Wait for the end of a process; return whether it has ended."""
    found = proc.read(pid)
    if found is None or not found.alive:
        return True
    return not proc.wait_gone([found], timeout_s)


def make_settings(**changes: Any) -> Settings:
    """Return launcher settings without touching environment or files; given ones count as flags."""
    values: dict[str, Any] = {option.name: option.default for option in LAUNCH_OPTIONS}
    values |= {
        "model_path": Path("/models/qwen"),
        "served_model_name": "qwen",
        "engine": "torch",
        "engine_config": Path("/configs/agg.yaml"),
        "run_dir": Path("/runs"),
        "overrides": (),
    }
    sources = dict.fromkeys(values, "default")
    if "overrides" in changes:
        changes["overrides"] = tuple(parse_override(one, "--set") for one in changes["overrides"])
    values |= changes
    sources |= {name: f"--{name}" for name in changes}
    return Settings(**values, sources=sources)

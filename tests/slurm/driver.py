"""A run on the cluster of the tests as a user starts it: a script of multinode/ under salloc, or submitted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.slurm.cluster import MiniCluster

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / ".venv/bin/trtllm-launch"
READY_S = 60.0
END_S = 60.0
_LOOK_S = 0.05
# What a shell of a developer may hold, and a run would heed.
_NOT_OURS = (
    "NUM_",
    "MODEL_PATH",
    "ENGINE",
    "IMAGE",
    "MOUNTS",
    "DISCOVERY",
    "ETCD",
    "NATS",
    "RUN_DIR",
)


class Driver:
    """One started command with everything it has written."""

    def __init__(
        self, cluster: MiniCluster, runs: Path, words: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        self.cluster = cluster
        self.runs = runs
        ours = {k: v for k, v in cluster.environ.items() if not k.startswith(_NOT_OURS)}
        self.environ = {**ours, "ENGINE": "torch", "RUN_DIR": str(runs), **environ}
        self._text: list[str] = []
        self.popen = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=self.environ,
            cwd=ROOT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "".join(self._text)

    def wait_for(self, words: str, timeout_s: float = READY_S) -> str:
        """Wait until a text was written; fail with all that was when the command ends before."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            ended = self.popen.poll() is not None
            if ended:
                self._reader.join(5.0)
            late = time.monotonic() > deadline
            assert words in self.text or not (ended or late), f"no {words!r} in:\n{self.text}"
            time.sleep(_LOOK_S)
        return self.text

    def url(self) -> str:
        """Wait until it serves, and return where."""
        self.wait_for("ready after ")
        line = next(line for line in self.text.splitlines() if line.startswith("ready after "))
        return line.rpartition(" at ")[2].removesuffix("/v1")

    def wait(self, timeout_s: float = END_S) -> int:
        """Wait for its end; return the exit code."""
        try:
            code = self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout_s} s:\n{self.text}") from None
        self._reader.join(5.0)
        return code

    def interrupt(self) -> int:
        """Press Ctrl-C, which salloc leaves to the command that it runs; return the exit code."""
        for pid in below(self.popen.pid):
            if b"slurm\0run" in cmdline(pid):
                os.kill(pid, signal.SIGINT)
        return self.wait()

    def close(self) -> None:
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._reader.join(5.0)
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.popen.stdout:
                self._text.append(line)


@contextlib.contextmanager
def started(
    cluster: MiniCluster, runs: Path, *words: str, nodes: int = 0, **environ: str
) -> Iterator[Driver]:
    """Start a command of this checkout: in an allocation of so many nodes, or outside of any."""
    inside = ("salloc", f"--nodes={nodes}", "--no-kill") if nodes else ()
    driver = Driver(cluster, runs, [*inside, *words], environ)
    try:
        yield driver
    finally:
        driver.close()


def completion(url: str, prompt: str, max_tokens: int = 24, timeout_s: float = 60.0) -> str:
    """Return the greedy answer of the demo model, which has learnt to chat."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "demo", "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return str(
        post(f"{url}/v1/chat/completions", body, timeout_s)["choices"][0]["message"]["content"]
    )


def post(url: str, body: Mapping[str, Any], timeout_s: float = 60.0) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


def get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as wrong:
        return json.load(wrong)


def nodes_by_rank(cluster: MiniCluster, runs: Path) -> dict[tuple[str, int], str]:
    """Return where ``slurm status`` says each rank of each part is."""
    done = cluster.run([str(CLI), "slurm", "status", "--run-dir", str(runs)])
    assert done.returncode == 0, done.stderr
    found, part = {}, ""
    lines = done.stdout.splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith("part "))
    columns = [lines[begin].index(word) for word in ("rank", "node", "address")]
    for line in lines[begin + 1 :]:
        part = line[: columns[0]].strip() or part
        rank = int(line[columns[0] : columns[1]])
        found[part, rank] = line[columns[1] : columns[2]].strip()
    return found


def left_on(cluster: MiniCluster, nodes: Sequence[str], run_id: str = "") -> list[str]:
    """Return what runs of ours have left on nodes: processes, names in /dev/shm, folders."""
    look = (
        "for p in /proc/[0-9]*; do tr '\\0' '\\n' <$p/environ 2>/dev/null "
        f"| grep -q '^TRTLLM_LAUNCH_RUN_ID={run_id}' && tr '\\0' ' ' <$p/cmdline && echo; done; "
        "ls /dev/shm; ls -d /tmp/trtllm-launch-etcd-* 2>/dev/null; true"
    )
    found = []
    for node in nodes:
        done = cluster.exec(node, ["bash", "-c", look])
        found += [f"{node}: {line}" for line in done.stdout.splitlines() if line.strip()]
    return found


def below(pid: int) -> list[int]:
    """Return a process and everything under it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{one}/task/{one}/children").read_text()
            found += [int(word) for word in text.split()]
    return found


def cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""

"""Facts about processes of this host, from /proc, and signals that cannot hit a stranger.

Knows nothing of runs. A process is identified by pid and start time together: pids are reused.
Needs Linux.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Proc:
    """One process as /proc/<pid>/stat shows it. ``start_ticks`` counts from boot (field 22)."""

    pid: int
    ppid: int
    pgid: int
    session: int
    state: str
    start_ticks: int
    rss_bytes: int

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie has ended and only waits for its parent."""
        return self.state not in "ZXx"

    @property
    def uptime_s(self) -> float:
        """Return seconds since it was started."""
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - self.start_ticks / _TICKS_PER_S)


def read(pid: int) -> Proc | None:
    """Return the process of that pid, or None when there is none."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The command name stands in parentheses and may itself hold spaces and parentheses.
    fields = stat[stat.rindex(")") + 2 :].split()
    return Proc(
        pid=pid,
        state=fields[0],
        ppid=int(fields[1]),
        pgid=int(fields[2]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        rss_bytes=int(fields[21]) * _PAGE_BYTES,
    )


def same(pid: int, start_ticks: int) -> Proc | None:
    """Return the live process of that pid and start time; None when it ended or was replaced."""
    found = read(pid)
    return found if found and found.alive and found.start_ticks == start_ticks else None


def is_ancestor(pid: int) -> bool:
    """Return whether this process was started by that one, directly or not."""
    found = read(os.getpid())
    while found is not None and found.ppid > 1:
        if found.ppid == pid:
            return True
        found = read(found.ppid)
    return False


def everyone() -> Iterator[Proc]:
    """Yield every live process that can be seen."""
    for entry in os.listdir(PROC):
        if entry.isdigit() and (found := read(int(entry))) and found.alive:
            yield found


def variables(pid: int) -> dict[str, str]:
    """Return the environment a process was started with; empty where it may not be read."""
    try:
        block = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in block.split(b"\0") if b"=" in entry)
    return {name: value for name, _, value in pairs}


def command(pid: int, limit: int = 120) -> str:
    """Return the command line of a process for people, cut to ``limit`` characters."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    except OSError:
        return ""
    text = " ".join(word.decode("utf-8", "replace") for word in words)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def send(target: Proc, number: int) -> bool:
    """Send a signal to exactly this process; False when it is gone (or not ours to signal)."""
    try:
        handle = os.pidfd_open(target.pid)
    except OSError:
        return False
    try:
        # The handle is bound to whoever has the pid now; check that this is who was meant.
        if same(target.pid, target.start_ticks) is None:
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def wait_gone(targets: Iterable[Proc], timeout_s: float) -> list[Proc]:
    """Wait until all have ended, at most ``timeout_s``; return those that still live."""
    poller = select.poll()
    waiting: dict[int, Proc] = {}
    try:
        for target in targets:
            with suppress(OSError):
                handle = os.pidfd_open(target.pid)
                waiting[handle] = target
                poller.register(handle, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        alive = {h for h, target in waiting.items() if same(target.pid, target.start_ticks)}
        while alive and (left := deadline - time.monotonic()) > 0:
            for handle, _event in poller.poll(left * 1000):
                poller.unregister(handle)
                alive.discard(handle)
        return [waiting[handle] for handle in alive]
    finally:
        for handle in waiting:
            os.close(handle)


def pid_namespace() -> str:
    """Return what tells the pids seen here from those of other containers; "" where it cannot be told."""
    try:
        return os.readlink(PROC / "self/ns/pid")
    except OSError:
        return ""


def boot_id() -> str:
    """Return what tells this boot of this host from every other; pids mean nothing across boots."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""

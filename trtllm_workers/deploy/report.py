"""The sentences a run ends or begins with: who died and how, what is stuck, how to go on.

Pure: facts in, text out.
"""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

_SIGNALS = {
    signal.SIGKILL: "somebody killed it, or the kernel did because memory ran out (see dmesg)",
    signal.SIGTERM: "somebody asked it to stop",
    signal.SIGSEGV: "segmentation fault in native code",
    signal.SIGBUS: "bus error, e.g. /dev/shm or a mapped file ran out of room",
    signal.SIGABRT: "native code gave up, its message is above",
    signal.SIGILL: "an instruction that this CPU does not have",
    signal.SIGFPE: "arithmetic error in native code",
}
_CODES = {
    0: "without an error, but nobody asked it to end",
    2: "a setting is wrong",
    3: "it could not start",
    4: "the engine died",
    126: "the command cannot be executed",
    127: "the command was not found",
}


def exit_in_words(status: int) -> str:
    """Return how a process ended; ``status`` is its exit code, or minus the signal's number."""
    if status < 0:
        number = -status
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "a real-time signal"
        hint = _SIGNALS.get(number)  # type: ignore[call-overload]
        return f"was killed by {name} (signal {number})" + (f": {hint}" if hint else "")
    hint = _CODES.get(status)
    return f"ended with exit code {status}" + (f": {hint}" if hint else "")


def duration(seconds: float) -> str:
    """Return a duration for people: 0.4 s, 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def last_lines(name: str, lines: Sequence[str], log: Path | None) -> str:
    """Return the end of a process's output, indented, and where the rest is."""
    if not lines:
        return f"{name} wrote nothing"
    where = f"\nwhole log: {log}" if log else ""
    head = f"last {len(lines)} lines of {name}:" if len(lines) > 1 else f"last line of {name}:"
    return "\n".join([head, *(f"  | {line}" for line in lines)]) + where


def part(name: str, rank: int | None = None, node: str = "") -> str:
    """Return who it is: ``decode-0``, ``rank 3 of decode-0 on node7``."""
    who = name if rank is None else f"rank {rank} of {name}"
    return f"{who} on {node}" if node else who


def death(
    name: str,
    status: int,
    *,
    after_s: float,
    step: str,
    lines: Sequence[str],
    log: Path | None,
    rank: int | None = None,
    restarted: str = "",
    node: str = "",
) -> str:
    """Return the report about the process, or the one rank of it, whose death ended the run.

    ``restarted`` says how often it had been started again, in words; ``node`` where it was, when that
    is not this host.
    """
    who = part(name, rank, node)
    again = f"{restarted}\n" if restarted else ""
    return (
        f"{who} {exit_in_words(status)}\n"
        f"it lived {duration(after_s)} and had come to '{step}'; the run was ended with it\n"
        f"{again}"
        f"{last_lines(name, lines, log)}"
    )


def stuck(
    name: str,
    step: str,
    *,
    since_s: float,
    timeout_s: float,
    lines: Sequence[str],
    log: Path | None,
) -> str:
    """Return the report about the part that did not become ready in time."""
    return (
        f"not ready after {duration(timeout_s)}: {name} is stuck at '{step}' "
        f"for {duration(since_s)}\n"
        f"if it only needs more time, raise --start-timeout-s\n"
        f"{last_lines(name, lines, log)}"
    )


def banner(
    *,
    run_id: str,
    model: str,
    url: str,
    took_s: float,
    log_dir: Path,
    stop: str = "trtllm-launch stop",
    look: str = "trtllm-launch ps",
) -> str:
    """Return what is said once everything is ready."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "What is a handoff?"}],
        "stream": True,
    }
    rule = "─" * 78
    return "\n".join(
        [
            rule,
            f"ready after {duration(took_s)}: {model} at {url}/v1",
            "",
            f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
            f"    -d {shlex.quote(json.dumps(body, ensure_ascii=False))}",
            "",
            f"  stop     Ctrl-C here, or anywhere: {stop} {run_id}",
            f"  look     {look}",
            f"  logs     {log_dir}",
            rule,
        ]
    )

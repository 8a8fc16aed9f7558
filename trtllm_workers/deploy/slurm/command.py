"""Runs one of SLURM's commands to its end: stdout and stderr kept apart, and a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from trtllm_workers.config.env import child_environment

COMMAND_TIMEOUT_S: Final = 20.0
CODE_NOT_FOUND: Final = 127  # as a shell has it
CODE_TIMED_OUT: Final = 124  # as timeout(1) has it
_KILL_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command wrote and how it ended. ``stderr`` is for people; no answer is read from it."""

    code: int
    stdout: str = ""
    stderr: str = ""

    @property
    def is_missing(self) -> bool:
        """Whether the program is not there at all."""
        return self.code == CODE_NOT_FOUND

    @property
    def is_late(self) -> bool:
        """Whether it did not end before the deadline and was killed."""
        return self.code == CODE_TIMED_OUT

    @property
    def complaint(self) -> str:
        """What to show to a person about a failure, in one line."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return "; ".join(lines) or f"exit code {self.code}"


class RunCommand(Protocol):
    """Runs a command on a machine that talks to SLURM.

    * Returns an Answer whatever happens: a missing program and a missed deadline are codes too.
    * Nothing it started outlives the call, not even one that is cancelled.
    """

    async def __call__(
        self, argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> Answer: ...


async def run_command(argv: Sequence[str], *, timeout_s: float = COMMAND_TIMEOUT_S) -> Answer:
    """Run a command here, see RunCommand."""
    try:
        started = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment({"LC_ALL": "C"}),
            start_new_session=True,
        )
    except OSError as wrong:
        return Answer(CODE_NOT_FOUND, stderr=f"{argv[0]}: {wrong.strerror or wrong}")
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await started.communicate()
    except TimeoutError:
        await _end(started)
        return Answer(CODE_TIMED_OUT, stderr=f"{argv[0]}: no answer within {timeout_s:g} s")
    except asyncio.CancelledError:
        await _end(started)
        raise
    assert started.returncode is not None
    return Answer(started.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


async def _end(started: asyncio.subprocess.Process) -> None:
    """Kill a command and its children: one in the background would hold its pipes open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            await started.wait()

"""A deployment of our own: started with ``trtllm-launch up``, ended whatever happens. Knows no benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from trtllm_workers.errors import ConfigError, StartError

# 'up' itself gives up after --start-timeout-s; this bounds what cannot be expected.
_START_LIMIT_S = 6 * 3600.0
# It lets running requests end for --drain-timeout-s, and there are none.
_INTERRUPT_TIMEOUT_S = 60.0
_TERMINATE_TIMEOUT_S = 30.0
_TAIL_LINES = 25
_READY = re.compile(r"^ready after .* at (http://\S+?)/v1$")
# What a verdict decides itself.
_DECIDED = (
    "--disaggregated --num-workers --num-prefill-workers --num-decode-workers --engine --http-port "
    "--run-dir --dry-run"
)


@dataclass(frozen=True, slots=True)
class Split:
    """How workers are used: all aggregated, or so many for prefill and so many for decode."""

    prefill: int = 0
    decode: int = 0
    aggregated: int = 0

    @property
    def name(self) -> str:
        """Return it for people, and for folders."""
        if self.aggregated:
            return f"{self.aggregated} aggregated"
        return f"{self.prefill} prefill + {self.decode} decode"

    def options(self) -> list[str]:
        """Return the options of 'up' that make it so."""
        if self.aggregated:
            return ["--num-workers", str(self.aggregated)]
        return [
            *("--disaggregated", "--num-prefill-workers", str(self.prefill)),
            *("--num-decode-workers", str(self.decode)),
        ]


def splits_of(num_workers: int, most: int = 3) -> list[Split]:
    """Return ways to share workers out: all of them when they are few, else some spread evenly."""
    if num_workers < 2:
        raise ConfigError(
            f"--workers {num_workers}: prefill and decode need one worker each; give 2 or more",
            param="workers",
        )
    prefills = list(range(1, num_workers))
    if len(prefills) > most:
        prefills = sorted({round(num_workers * part / (most + 1)) for part in range(1, most + 1)})
    return [Split(prefill=number, decode=num_workers - number) for number in prefills]


def parse_splits(text: str, num_workers: int) -> list[Split]:
    """Return the splits of ``1+3,2+2``. Raises ConfigError for what is none of ``num_workers``."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})\+(\d{1,3})\s*", word)
        prefill, decode = (int(match[1]), int(match[2])) if match else (0, 0)
        if min(prefill, decode) < 1 or prefill + decode != num_workers:
            raise ConfigError(
                f"--splits: '{word}' is no PREFILL+DECODE of {num_workers} workers; "
                f"write for example 1+{num_workers - 1}",
                param="splits",
            )
        found.append(Split(prefill=prefill, decode=decode))
    return found


def require_free(words: Sequence[str]) -> None:
    """Raise ConfigError for an option of 'up' that the verdict gives itself."""
    for word in words:
        if word.partition("=")[0] in _DECIDED.split():
            raise ConfigError(f"{word} after -- is the verdict's to decide; leave it out")


@contextlib.asynccontextmanager
async def started(argv: Sequence[str], environ: Mapping[str, str]) -> AsyncIterator[str]:
    """Run a command that says where it serves; yield the URL, and end it with all it started.

    Raises StartError with its last lines when it ends before. It leads a session of its own, so that a
    Ctrl-C at the terminal comes to us first, and we end it.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(environ),
        start_new_session=True,
    )
    assert process.stdout is not None, "a pipe was asked for"
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    reading: asyncio.Task[None] | None = None
    try:
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                url = await _ready(process.stdout, tail)
        except TimeoutError:
            url = None
        if url is None:
            said = "\n".join(tail)
            raise StartError(f"the deployment did not get ready: {' '.join(argv)}\n{said}")
        # Somebody must read on, else it blocks when the pipe is full.
        reading = asyncio.create_task(_drain(process.stdout, tail))
        yield url
    finally:
        await _end(process)
        if reading is not None:
            await reading


async def _ready(stdout: asyncio.StreamReader, tail: deque[str]) -> str | None:
    async for line in stdout:
        tail.append(line.decode(errors="replace").rstrip())
        if found := _READY.match(tail[-1]):
            return found.group(1)
    return None


async def _drain(stdout: asyncio.StreamReader, tail: deque[str]) -> None:
    async for line in stdout:
        tail.append(line.decode(errors="replace").rstrip())


async def _end(process: asyncio.subprocess.Process) -> None:
    for number, timeout_s in (
        (signal.SIGINT, _INTERRUPT_TIMEOUT_S),
        (signal.SIGTERM, _TERMINATE_TIMEOUT_S),
        (signal.SIGKILL, _TERMINATE_TIMEOUT_S),
    ):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)  # its run's guard ends what it leaves behind
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await process.wait()

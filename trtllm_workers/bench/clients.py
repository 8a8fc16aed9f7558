"""Who asks the requests of a level: our own client, or aiperf where it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from trtllm_workers.bench import aiperf
from trtllm_workers.bench.client import Client
from trtllm_workers.bench.prompts import Prompts
from trtllm_workers.bench.records import Record, failures, problem_of
from trtllm_workers.bench.workload import Load, Workload, arrivals
from trtllm_workers.errors import ConfigError, StartError

ClientName = Literal["auto", "aiperf", "own"]

# aiperf starts a dozen processes before its first request.
_AIPERF_START_S = 120.0
_END_TIMEOUT_S = 10.0
_TAIL_LINES = 15


class Asker(Protocol):
    """Measures one level.

    * ``warm_up`` asks what is not measured, unless ``measure`` does so itself.
    * ``measure`` returns a record of every request of the level, wrong ones with their ``problem``, and
      the seconds of CPU that asking took, where they are known.
    * Equal seeds ask for equal prompts.
    * ``name`` says who it is, once something was measured with its version.
    """

    name: str

    async def warm_up(self, load: Load, seed: int) -> None: ...

    async def measure(
        self, load: Load, folder: Path, seed: int
    ) -> tuple[list[Record], float | None]: ...


class Own:
    """Our own client."""

    name = "own"

    def __init__(self, client: Client, prompts: Prompts, workload: Workload) -> None:
        self._client = client
        self._prompts = prompts
        self._workload = workload

    async def warm_up(self, load: Load, seed: int) -> None:
        """See ``Asker``. Raises StartError when no request was good."""
        bodies = self._prompts.bodies(f"{load.name} {seed} warmup", load.num_warmup)
        if bodies:
            self._require_good(await self._client.closed_loop(bodies, load.concurrency or 2))

    async def measure(
        self, load: Load, folder: Path, seed: int
    ) -> tuple[list[Record], float | None]:
        """See ``Asker``."""
        del folder
        bodies = self._prompts.bodies(f"{load.name} {seed}", load.num_requests)
        before_s = time.process_time()
        if load.concurrency is not None:
            records = await self._client.closed_loop(bodies, load.concurrency)
        else:
            records = await self._client.open_loop(bodies, arrivals(load, seed))
        spent_s = time.process_time() - before_s
        for record in records:
            record.problem = problem_of(record, self._workload)
        return records, spent_s

    def _require_good(self, records: Sequence[Record]) -> None:
        for record in records:
            record.problem = problem_of(record, self._workload)
        if all(record.problem for record in records):
            first = next(iter(failures(records)))
            raise StartError(f"every warm-up request went wrong, most often: {first}")


class Aiperf:
    """NVIDIA's aiperf, a program of its own."""

    def __init__(
        self,
        program: str,
        prompts: Prompts,
        workload: Workload,
        *,
        url: str,
        model: str,
        tokenizer: Path | None,
        timeout_s: float,
    ) -> None:
        self.name = "aiperf"
        self._program = program
        self._prompts = prompts
        self._workload = workload
        self._url = url
        self._model = model
        self._tokenizer = tokenizer
        self._timeout_s = timeout_s

    async def warm_up(self, load: Load, seed: int) -> None:
        """Do nothing: aiperf warms up by itself."""

    async def measure(
        self, load: Load, folder: Path, seed: int
    ) -> tuple[list[Record], float | None]:
        """See ``Asker``. Raises StartError when aiperf does not do its work."""
        target = folder / "aiperf"
        words = aiperf.argv(
            self._program,
            url=self._url,
            model=self._model,
            tokenizer=self._tokenizer,
            workload=self._workload,
            load=load,
            template_tokens=self._prompts.words.template_tokens,
            ending=self._prompts.ending(),
            timeout_s=self._timeout_s,
            # Of one seed aiperf makes the same prompts at every level, and the second one would find
            # those of the first in the prefix cache.
            seed=seed + round(1000 * (load.concurrency or load.request_rate or 0)),
            folder=target,
        )
        requests = load.num_requests + load.num_warmup
        waves = requests / load.concurrency if load.concurrency else requests
        output = await _run(words, _AIPERF_START_S + self._timeout_s * max(2.0, waves))
        try:
            records, version = aiperf.read(target, self._workload)
        except StartError as wrong:
            raise StartError(f"{wrong}\naiperf's last lines:\n{output}") from wrong
        if version:
            self.name = f"aiperf {version}"
        return records, None


def find_aiperf(wanted: ClientName, path: str | None) -> str | None:
    """Return aiperf's program if it is to be used: always for ``aiperf``, for ``auto`` where it is.

    Raises ConfigError when it was asked for and is not there.
    """
    if wanted == "own":
        return None
    program = shutil.which("aiperf", path=path)
    if wanted == "aiperf" and program is None:
        raise ConfigError(
            "--client aiperf: there is no aiperf on PATH; pip install aiperf (in an environment of "
            "its own), or measure with --client own",
            param="client",
        )
    return program


async def _run(words: Sequence[str], timeout_s: float) -> str:
    """Run a program to its end and return its last lines; its exit code says too little to look at."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, _ = await process.communicate()
    except TimeoutError:
        raise StartError(f"aiperf did not end within {timeout_s:.0f} s") from None
    finally:
        if process.returncode is None:
            await _end(process)
    return "\n".join(output.decode(errors="replace").splitlines()[-_TAIL_LINES:])


async def _end(process: asyncio.subprocess.Process) -> None:
    """End aiperf with the processes it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                await process.wait()

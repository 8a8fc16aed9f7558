"""Runs a step on all nodes of a job beside its parts, and keeps what srun says of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtllm_workers.config.env import child_environment
from trtllm_workers.deploy.run import RUN_FOLDER, RUN_ID
from trtllm_workers.deploy.slurm.plan import SlurmPlan
from trtllm_workers.deploy.slurm.steps import unset_for_srun
from trtllm_workers.errors import ConfigError

_END_WAIT_S = 5.0
_LAST_LINES = 8
_MOST_CHARS = 20_000

# What srun says, and what to do about it.
_SAYINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"unrecognized option.*--container", re.IGNORECASE),
        "srun knows no containers here (no pyxis); leave IMAGE empty and install trtllm-launch where all "
        "nodes see it, or ask for pyxis and enroot",
    ),
    (
        re.compile(
            r"Invalid job id|Unable to confirm allocation|already complet|allocation.*revoked"
        ),
        "the allocation is over; make a new one (salloc, or let 'trtllm-launch slurm run' submit a job)",
    ),
    (
        re.compile(
            r"[Pp]yxis.*(failed to import|not found|couldn't start container|image)|No such image"
        ),
        "the image could not be had; check IMAGE, and that this node may fetch or read it",
    ),
    (
        re.compile(r"Invalid MPI type|MPI: Cannot|mpi_.*not found|plugin.*mpi/", re.IGNORECASE),
        "the cluster does not offer that --mpi type; 'srun --mpi=list' shows those it has",
    ),
    (
        re.compile(r"execve\(\).*No such file|No such file or directory.*python|python.*not found"),
        "the Python that runs trtllm-launch is not on this node; install the environment on a file system "
        "that all nodes share, or use an IMAGE",
    ),
    (
        re.compile(r"No module named .?trtllm_workers"),
        "trtllm-launch is not installed in that Python; build the image with container/build.sh, or name "
        "its Python with --image-python",
    ),
    (
        re.compile(
            r"node count|More processors requested|Requested node configuration|nodes are busy"
        ),
        "SLURM does not give these nodes to a step; the allocation is too small, or another step holds them "
        "alone",
    ),
    (
        re.compile(
            r"Unable to create step|Invalid generic resource|Invalid account|Access/permission"
        ),
        "SLURM refuses the step; its words are below",
    ),
)
_JOB_IS_OVER = _SAYINGS[1][0]


@dataclass(frozen=True, slots=True)
class Said:
    """How a step ended, and the end of what srun and its tasks wrote. ``late``: it had to be ended."""

    status: int
    text: str = ""
    late: bool = False

    @property
    def hint(self) -> str:
        """What its words mean, and what to do; "" when they mean nothing to us."""
        return next((hint for pattern, hint in _SAYINGS if pattern.search(self.text)), "")

    @property
    def means_the_job_is_over(self) -> bool:
        """Whether SLURM has ended the job already."""
        return bool(_JOB_IS_OVER.search(self.text))

    def last_words(self) -> str:
        """Return the last lines, for a report."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        if not lines:
            return "srun said nothing"
        return "srun said:\n" + "\n".join(f"  | {line}" for line in lines[-_LAST_LINES:])


class Steps:
    """Steps of one job that come to an end by themselves; nothing that was started outlives its call."""

    def __init__(self, made: SlurmPlan, environ: Mapping[str, str]) -> None:
        self._made = made
        self._environ = environ

    async def run(self, words: Sequence[str], timeout_s: float, log: str = "") -> Said:
        """Run a step to its end, or end it when it is late.

        With ``log`` its output is kept in the run's logs under that name unless it ends well. Raises
        ConfigError when there is no srun.
        """
        plan = self._made.plan
        path = plan.log_dir / f"{log}.log" if log else Path(os.devnull)
        extra = {RUN_ID: plan.run_id, RUN_FOLDER: str(plan.folder.path)}
        gone = {name: None for name in unset_for_srun(self._environ)}
        late = False
        with path.open("wb") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=child_environment({**extra, **gone}),
                    start_new_session=True,
                )
            except OSError as wrong:
                raise ConfigError(
                    f"cannot start {words[0]}: {wrong.strerror}; is this a SLURM cluster?",
                    param="engine",
                ) from wrong
        try:
            async with asyncio.timeout(timeout_s):
                await process.wait()
        except TimeoutError:
            late = True
        finally:
            if process.returncode is None:
                await _end(process)
        text = ""
        if log:
            with contextlib.suppress(OSError):
                text = path.read_text(errors="replace")[-_MOST_CHARS:]
                if process.returncode == 0 and not late:
                    path.unlink()
        return Said(process.returncode if process.returncode is not None else 1, text, late)


async def _end(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_WAIT_S):
                await process.wait()
                return

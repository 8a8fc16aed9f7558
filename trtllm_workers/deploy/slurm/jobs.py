"""Runs in SLURM jobs as they are found from any host that sees their folders: how far they are, and their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtllm_workers.config.tables import table
from trtllm_workers.deploy.ready import step_in_words
from trtllm_workers.deploy.report import duration
from trtllm_workers.deploy.run import RunFolder, RunRecord
from trtllm_workers.deploy.slurm import records
from trtllm_workers.deploy.slurm.command import run_command
from trtllm_workers.deploy.slurm.hostlist import compress
from trtllm_workers.deploy.slurm.submit import job_state
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.status import rank_status, read_status

_LOOK_S = 0.2
_CLOSING_S = 30.0
_CANCEL_WAIT_S = 60.0
_ASK_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class JobRun:
    """A run that has a folder and a job. ``state`` is SLURM's word for the job, "" for one that is over."""

    folder: RunFolder
    job: records.JobRecord
    run: RunRecord | None
    state: str
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether SLURM knows no such job any more."""
        return not self.state


async def find_jobs(roots: Sequence[Path]) -> list[JobRun]:
    """Return the runs under ``roots`` that are in SLURM jobs, the oldest first."""
    found = []
    for root in roots:
        for path in sorted(root.glob(f"*/{records.JOB}")):
            folder = RunFolder(path.parent)
            job = records.read(path, records.JobRecord)
            if job is None:
                continue
            state, reason = await job_state(job.job_id)
            found.append(JobRun(folder, job, folder.read(), state, reason))
    return sorted(found, key=lambda one: one.run.started_at_s if one.run else 0.0)


def as_text(jobs: Sequence[JobRun], now_s: float) -> str:
    """Return jobs, and every worker and rank of each, as tables."""
    if not jobs:
        return "no runs in SLURM jobs; 'trtllm-launch slurm run' starts one"
    parts = []
    for one in jobs:
        run, job = one.run, one.job
        head = [
            f"run {job.run_id} in job {job.job_id} ({_job_words(one)}) on {compress(job.nodes)}"
        ]
        if run is not None:
            age = duration(max(0.0, now_s - run.started_at_s))
            head.append(
                f"{run.model}: {run.state} since {age}" + (f", {run.url}/v1" if run.url else "")
            )
            head.append(f"logs in {run.log_dir}")
        parts.append("\n".join(head))
        parts.append(table(("part", "rank", "node", "address", "step"), _rows(one)))
    return "\n\n".join(parts)


def _job_words(one: JobRun) -> str:
    if one.is_over:
        return "over"
    return one.state.lower() + (f", {one.reason}" if one.reason not in ("", "None") else "")


def _rows(one: JobRun) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for part in one.job.parts:
        status = read_status(one.folder.status(part.name))
        for rank in range(len(part.nodes) * part.ranks_per_node):
            found = records.read(
                records.rank_path(one.folder.path, part.name, rank), records.RankRecord
            )
            own = read_status(rank_status(one.folder.status(part.name), rank)) if rank else status
            if own is not None and found is not None:
                step = step_in_words(own)
            elif found is not None:
                step = "started"
            else:
                step = "not started"
            rows.append(
                (
                    part.name if rank == 0 else "",
                    str(rank),
                    part.nodes[rank // part.ranks_per_node],
                    found.address if found else "-",
                    step,
                )
            )
    return rows


def choose(jobs: Sequence[JobRun], name: str | None) -> JobRun:
    """Return the run of that id, or in that job; without a name the only one. Raises ConfigError."""
    if name is None:
        live = [one for one in jobs if not one.is_over] or list(jobs)
        if len(live) == 1:
            return live[0]
        if not live:
            raise ConfigError("there is no run in a SLURM job to stop")
        shown = ", ".join(f"{one.job.run_id} (job {one.job.job_id})" for one in live)
        raise ConfigError(f"there are several runs; say which: {shown}")
    for one in jobs:
        if name in (one.job.run_id, one.job.job_id):
            return one
    shown = ", ".join(f"{one.job.run_id} (job {one.job.job_id})" for one in jobs) or "none"
    raise ConfigError(f"there is no run or job '{name}'; there are: {shown}")


async def stop_job(
    one: JobRun, drain_timeout_s: float, *, now: bool, say: Callable[[str], None]
) -> bool:
    """End a run: ask it to drain, wait, then cancel; return whether it is gone.

    A job that the run submitted ends with it. An allocation that somebody else made stays theirs: only the
    run's steps are cancelled.
    """
    job, folder = one.job, one.folder
    if one.is_over:
        folder.remove(keep_logs=True)
        say(
            f"job {job.job_id} was over already; what run {job.run_id} had left in {folder.path} is removed"
        )
        return True
    if not now:
        (folder.path / records.STOP).touch()
        say(f"run {job.run_id}: asked to stop; running requests get up to {drain_timeout_s:g} s")
        if await _gone(folder, drain_timeout_s + _CLOSING_S):
            say(f"run {job.run_id} has ended")
            return True
        say(f"run {job.run_id} did not end by itself")
    if job.submitted:
        say(f"cancelling job {job.job_id}")
        await run_command(["scancel", job.job_id], timeout_s=_ASK_TIMEOUT_S)
    else:
        steps = await _steps_of(job)
        say(f"cancelling {len(steps)} steps of job {job.job_id}; the allocation stays yours")
        if steps:
            await run_command(["scancel", *steps], timeout_s=_ASK_TIMEOUT_S)
    ends_s = time.monotonic() + _CANCEL_WAIT_S
    while time.monotonic() < ends_s:
        state, _ = await job_state(job.job_id)
        if not state or not await _steps_of(job):
            if not folder.path.exists() or not (folder.path / records.JOB).exists() or not state:
                folder.remove(keep_logs=True)
            say(f"run {job.run_id} has ended")
            return True
        await asyncio.sleep(_LOOK_S)
    say(f"job {job.job_id} is still there; 'squeue -j {job.job_id}' shows what SLURM waits for")
    return False


async def _gone(folder: RunFolder, timeout_s: float) -> bool:
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        if not (folder.path / records.JOB).exists():
            return True
        await asyncio.sleep(_LOOK_S)
    return False


async def _steps_of(job: records.JobRecord) -> list[str]:
    said = await run_command(
        ["squeue", "-s", "-h", "-j", job.job_id, "-o", "trtllm-launch-step|%i|%j"],
        timeout_s=_ASK_TIMEOUT_S,
    )
    found = []
    for line in said.stdout.splitlines():
        words = line.split("|")
        if len(words) == 3 and words[2].startswith(f"{job.run_id}."):
            found.append(words[1])
    return found

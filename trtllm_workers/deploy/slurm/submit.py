"""A run outside an allocation: submit a job that runs it, follow that until it serves, leave it running."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trtllm_workers.config.env import child_environment
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.deploy.slurm.command import run_command
from trtllm_workers.deploy.slurm.prepare import PreparedJob
from trtllm_workers.deploy.slurm.script import job_script, known_cluster, output_of
from trtllm_workers.deploy.slurm.steps import unset_for_srun
from trtllm_workers.errors import EXIT_INTERRUPTED, ConfigError, StartError

_SUBMIT_TIMEOUT_S = 60.0
_LOOK_S = 0.3
_MARK = "trtllm-launch-job"
_JOB_ID = re.compile(r"^(\d+)(;\S+)?$", re.MULTILINE)
_OVER = frozenset(
    {
        *("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"),
        *("DEADLINE", "PREEMPTED", "REVOKED"),
    }
)
_TELL_AGAIN_S = 30.0
# Why a job waits that no waiting will help, and what to do about it.
_NEVER = {
    "PartitionNodeLimit": "it asks for more nodes than its partition has or allows",
    "PartitionTimeLimit": "it asks for more time than its partition allows; see --time-limit",
    "BadConstraints": "no node has what it asks for",
}
_SURE_S = 2.0


async def submit(
    job: PreparedJob,
    folder: RunFolder,
    words: Sequence[str],
    environ: Mapping[str, str],
    *,
    detach: bool,
) -> int:
    """Submit the run; return 0 once it serves (at once with ``detach``), 130 after Ctrl-C.

    Raises ConfigError when SLURM refuses the job, StartError when it ends before it serves.
    """
    script = job_script(job, folder, words, environ, profile=known_cluster(job))
    job_id = await _sbatch(script, environ)
    output = output_of(folder)
    _say(
        f"run {folder.run_id} is job {job_id} on {job.layout.in_words()}; its words go to {output}"
    )
    if detach:
        _say(f"follow it: trtllm-launch slurm status {folder.run_id}")
        return 0
    return await _follow(folder, job_id, output)


async def _sbatch(script: str, environ: Mapping[str, str]) -> str:
    """Return the id of the new job. Raises ConfigError with what SLURM said."""
    gone = {name: None for name in unset_for_srun(environ)}
    try:
        process = await asyncio.create_subprocess_exec(
            *("sbatch", "--parsable"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(gone),
            start_new_session=True,
        )
    except OSError as wrong:
        raise ConfigError(
            f"cannot start sbatch: {wrong.strerror}; run this on a login node of a SLURM cluster, or take "
            "'trtllm-launch up' for this host alone"
        ) from wrong
    try:
        async with asyncio.timeout(_SUBMIT_TIMEOUT_S):
            out, err = await process.communicate(script.encode())
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise ConfigError(
            f"sbatch did not answer within {_SUBMIT_TIMEOUT_S:g} s; does slurmctld run (scontrol ping)?"
        ) from None
    found = _JOB_ID.search(out.decode(errors="replace"))
    if process.returncode or found is None:
        said = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
        lines = "\n".join(f"  | {line}" for line in said[-8:])
        raise ConfigError(
            "SLURM refuses the job; 'trtllm-launch slurm probe' finds out what this cluster wants\n"
            f"sbatch said:\n{lines}",
            param=_blamed("\n".join(said)),
        )
    return found[1]


def _blamed(said: str) -> str | None:
    text = said.casefold()
    return next((name for name in ("account", "partition", "qos") if name in text), None)


async def _follow(folder: RunFolder, job_id: str, output: Path) -> int:
    """Show the run's own words until it serves, has ended, or somebody is tired of waiting."""
    loop, tired = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, tired.set)
    told_s, shown, told = time.monotonic(), 0, ""
    never_since_s: float | None = None
    try:
        while not tired.is_set():
            state, reason = await job_state(job_id)
            shown = _show(output, shown)
            record = folder.read()
            if record is not None and record.state == "ready":
                _show(output, shown)
                _say(
                    f"job {job_id} goes on by itself; end it with: trtllm-launch slurm stop {folder.run_id}"
                )
                return 0
            if state in _OVER or not state:
                # Its output may come a moment after the news of its end.
                await _pause(tired, 1.0)
                _show(output, shown)
                raise StartError(
                    f"job {job_id} ended{f' ({state})' if state else ''} before it served; its words are in "
                    f"{output}"
                )
            now_s = time.monotonic()
            never_since_s = (never_since_s or now_s) if reason in _NEVER else None
            if never_since_s is not None and now_s - never_since_s > _SURE_S:
                await run_command(["scancel", job_id], timeout_s=_SUBMIT_TIMEOUT_S)
                raise ConfigError(
                    f"job {job_id} would never start ({reason}): {_NEVER[reason]}; it was cancelled",
                    param="num_nodes",
                )
            text = f"job {job_id}: {state.lower()}{f', {reason}' if reason != 'None' else ''}"
            if state != "RUNNING" and (text != told or now_s - told_s > _TELL_AGAIN_S):
                _say(text)
                told, told_s = text, now_s
            await _pause(tired, _LOOK_S)
        _say(f"cancelling job {job_id}")
        await run_command(["scancel", job_id], timeout_s=_SUBMIT_TIMEOUT_S)
        return EXIT_INTERRUPTED
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def job_state(job_id: str) -> tuple[str, str]:
    """Return a job's state and why it waits, in SLURM's words; "" for one that SLURM has forgotten."""
    said = await run_command(["squeue", "-h", "-j", job_id, "-o", f"{_MARK}|%T|%r"])
    for line in said.stdout.splitlines():
        words = line.split("|")
        if len(words) == 3 and words[0] == _MARK:
            return words[1], words[2]
    if said.code and "nvalid job id" not in said.stderr:
        return "UNKNOWN", said.complaint  # slurmctld is away; the job need not be
    return "", ""


def _show(output: Path, shown: int) -> int:
    """Write what has come to a file since; return how far it was shown."""
    try:
        with output.open("rb") as file:
            file.seek(shown)
            found = file.read()
    except OSError:
        return shown
    sys.stdout.write(found.decode(errors="replace"))
    sys.stdout.flush()
    return shown + len(found)


async def _pause(tired: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await tired.wait()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

"""The job script of a run that is submitted: what sbatch gets. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.slurm_options import SLURM_OPTIONS
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.deploy.slurm.directives import BatchJob, sbatch_text
from trtllm_workers.deploy.slurm.picks import gpu_flags, pick_account
from trtllm_workers.deploy.slurm.prepare import PreparedJob
from trtllm_workers.deploy.slurm.profile import Profile, load, newest_profile
from trtllm_workers.deploy.slurm.steps import split_words
from trtllm_workers.worker.rank_env import is_secret, rank_variables

_MODULE = "trtllm_workers.cli.main"
_DEFAULT_NAME = "trtllm-launch"
# Before the time limit ends everything: enough to drain and to clear the nodes.
_CLOSING_S = 30


def job_script(
    job: PreparedJob,
    folder: RunFolder,
    words: Sequence[str],
    environ: Mapping[str, str],
    *,
    profile: Profile | None = None,
) -> str:
    """Return the script: directives, the variables that count, and this command again with ``words``.

    Secrets are not in it: sbatch passes them on in the environment. ``profile`` is what is known of the
    cluster; without it GPUs are asked for as most clusters take it.
    """
    return sbatch_text(batch_job(job, folder, words, environ, profile))


def batch_job(
    job: PreparedJob,
    folder: RunFolder,
    words: Sequence[str],
    environ: Mapping[str, str],
    profile: Profile | None = None,
) -> BatchJob:
    """Return what is submitted; ``profile`` is what is known of the cluster."""
    slurm = job.slurm
    extra = list(split_words(slurm.sbatch_args, "--sbatch-args"))
    if slurm.reservation:
        extra.append(f"--reservation={slurm.reservation}")
    return BatchJob(
        name=slurm.job_name or _DEFAULT_NAME,
        num_nodes=job.layout.num_nodes,
        gpu_flags=_gpu_flags(job, profile),
        account=pick_account(profile, slurm.account) if profile else slurm.account,
        partition=slurm.partition,
        qos=slurm.qos,
        time_limit=slurm.time_limit,
        output=str(output_of(folder)),
        extra=tuple(extra),
        no_kill=True,
        no_requeue=True,
        signal_before_end_s=int(job.settings.drain_timeout_s) + _CLOSING_S
        if slurm.time_limit
        else None,
        chdir=str(Path.cwd()),
        words=(
            *("env", *(f"{name}={value}" for name, value in exports(environ).items())),
            *(sys.executable, "-P", "-m", _MODULE, "slurm", "run"),
            *("--run-id", folder.run_id, *words),
        ),
    )


def _gpu_flags(job: PreparedJob, profile: Profile | None) -> tuple[str, ...]:
    gpus = job.layout.gpus_per_node
    if not gpus:
        return ()
    return (f"--gpus-per-node={gpus}",) if profile is None else gpu_flags(profile, gpus)


def known_cluster(job: PreparedJob) -> Profile | None:
    """Return what ``slurm probe`` has kept of this cluster; None when nobody has probed."""
    path = newest_profile(job.settings.run_dir)
    return None if path is None else load(path)


def output_of(folder: RunFolder) -> Path:
    """Return where a submitted run's own words go."""
    return folder.path.with_name(f"{folder.run_id}.out")


def exports(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that the run is told by, without secrets."""
    ours = {name for one in (*LAUNCH_OPTIONS, *SLURM_OPTIONS) for name in one.env}
    hidden = {name for one in LAUNCH_OPTIONS if one.secret for name in one.env}
    found = {name: environ[name] for name in sorted(ours & set(environ)) if environ[name].strip()}
    found |= rank_variables(environ)
    return {
        name: value
        for name, value in sorted(found.items())
        if name not in hidden and not is_secret(name) and name != "CUDA_VISIBLE_DEVICES"
    }

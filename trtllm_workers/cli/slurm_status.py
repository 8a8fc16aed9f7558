"""``trtllm-launch slurm status``: runs in SLURM jobs, every worker and rank of each."""

from __future__ import annotations

import asyncio
import time

import click

from trtllm_workers.cli.options import GroupedCommand
from trtllm_workers.cli.slurm_common import RUN_DIR_HELP


@click.command("status", cls=GroupedCommand)
@click.argument("run", required=False)
@click.option("--run-dir", metavar="DIR", help=RUN_DIR_HELP)
def command(run: str | None, run_dir: str | None) -> int:
    """Show runs in SLURM jobs; RUN is a run's or a job's id."""
    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.slurm.jobs import as_text, choose, find_jobs

    roots, _ = roots_of_runs(run_dir, environment())
    jobs = asyncio.run(find_jobs(roots))
    if run is not None:
        jobs = [choose(jobs, run)]
    print(as_text(jobs, time.time()))
    return 0

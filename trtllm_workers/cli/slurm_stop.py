"""``trtllm-launch slurm stop``: ends a run in a SLURM job, from any host that sees its folder."""

from __future__ import annotations

import asyncio

import click

from trtllm_workers.cli.options import GroupedCommand
from trtllm_workers.cli.slurm_common import RUN_DIR_HELP


@click.command("stop", cls=GroupedCommand)
@click.argument("run", required=False)
@click.option("--now", is_flag=True, help="Cancel at once; running requests are cut off.")
@click.option("--run-dir", metavar="DIR", help=RUN_DIR_HELP)
def command(run: str | None, now: bool, run_dir: str | None) -> int:
    """End a run: drain, clear its nodes, give back a job that it submitted; RUN is a run's or a job's id."""
    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.slurm.jobs import choose, find_jobs, stop_job

    roots, _ = roots_of_runs(run_dir, environment())

    async def end() -> bool:
        one = choose(await find_jobs(roots), run)
        drain_s = one.run.drain_timeout_s if one.run else 0.0
        return await stop_job(one, drain_s, now=now, say=print)

    return 0 if asyncio.run(end()) else 4

"""``trtllm-launch slurm run``: inside an allocation it runs; outside it submits a job that does."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from trtllm_workers.cli.common import warn
from trtllm_workers.cli.options import GroupedCommand, secret_variables
from trtllm_workers.cli.slurm_common import JOB_NAMES, given_of, job_options, run_folder, words_of


@click.command(
    "run",
    cls=GroupedCommand,
    variables=secret_variables(JOB_NAMES),
    epilog="Inside salloc or a job it runs there until Ctrl-C; elsewhere it submits a job, follows it until "
    "it serves, and leaves it running.",
)
@job_options
@click.option("--detach", is_flag=True, help="Submit a job and do not wait for it.")
@click.option("--run-id", hidden=True, help="Which run a submitted job is.")
def command(detach: bool, run_id: str | None, **values: Any) -> int:
    """Start an ingress and workers on the nodes of a SLURM job."""
    from trtllm_workers.config.env import child_environment, environment, wants_colour
    from trtllm_workers.deploy.output import Terminal
    from trtllm_workers.deploy.slurm.job import JobSite
    from trtllm_workers.deploy.slurm.prepare import (
        allocation_of,
        mpi_type,
        plan_job,
        prepare_job,
        secrets_of,
    )
    from trtllm_workers.deploy.slurm.script import output_of
    from trtllm_workers.deploy.up import run_plan

    environ = environment()
    job = prepare_job(given_of(values), environ)
    warn(job.notes)
    allocation = allocation_of(environ)
    if allocation is None:
        from trtllm_workers.deploy.slurm.submit import submit

        folder = run_folder(job.settings, None, to_start=True)
        return asyncio.run(
            submit(
                job, folder, words_of(click.get_current_context(), values), environ, detach=detach
            )
        )
    folder = run_folder(job.settings, run_id, to_start=True)
    mpi = asyncio.run(mpi_type(job))
    made = plan_job(job, allocation, folder, mpi=mpi, environ=environ)
    warn(made.plan.notes)
    environ |= secrets_of(job, environ)
    terminal = Terminal(
        sys.stdout.fileno(),
        colour=wants_colour(environ, sys.stdout.isatty()),
        names=[process.name for process in made.plan.processes],
    )
    strategy = f", strategy {job.settings.strategy}" if job.settings.disaggregated else ""
    try:
        terminal.say(
            f"run {made.plan.run_id} in job {allocation.job_id}: {made.plan.model} with engine "
            f"{job.settings.engine}, {made.plan.workers_in_words}{strategy}; {made.layout.in_words()}"
        )
        site = JobSite(made, environ, submitted=run_id is not None)
        code = asyncio.run(run_plan(made.plan, child_environment(), terminal, site=site))
    finally:
        terminal.close()
    if run_id is not None:
        # A job that ended well leaves no file; its words were shown to whoever submitted it.
        output_of(folder).unlink(missing_ok=True)
    return code

"""``trtllm-launch slurm plan``: the job script and every srun, as text. Asks SLURM nothing."""

from __future__ import annotations

from typing import Any

import click

from trtllm_workers.cli.common import warn
from trtllm_workers.cli.options import GroupedCommand, secret_variables
from trtllm_workers.cli.slurm_common import JOB_NAMES, given_of, job_options, run_folder, words_of


@click.command("plan", cls=GroupedCommand, variables=secret_variables(JOB_NAMES))
@job_options
@click.option("--show-config", is_flag=True, help="Print every setting with its source instead.")
def command(show_config: bool, **values: Any) -> int:
    """Print what a run would ask of SLURM, and start nothing."""
    from trtllm_workers.config.engine_config import show_config as show_engine_config
    from trtllm_workers.config.env import environment
    from trtllm_workers.config.settings import show_settings
    from trtllm_workers.config.slurm_options import show_slurm_settings
    from trtllm_workers.deploy.slurm.prepare import (
        allocation_of,
        imagined,
        likely_mpi_type,
        plan_job,
        prepare_job,
    )
    from trtllm_workers.deploy.slurm.script import job_script, known_cluster
    from trtllm_workers.deploy.slurm.text import as_text

    environ = environment()
    job = prepare_job(given_of(values), environ)
    warn(job.notes)
    if show_config:
        tables = [
            f"launcher settings\n\n{show_settings(job.settings, JOB_NAMES)}",
            f"job\n\n{show_slurm_settings(job.slurm)}",
        ]
        for role, config in job.configs.items():
            tables.append(f"engine config of {role} workers\n\n{show_engine_config(config)}")
        print("\n\n".join(tables))
        return 0
    folder = run_folder(job.settings, None, to_start=False)
    allocation = allocation_of(environ)
    made = plan_job(
        job, allocation or imagined(job.layout), folder, mpi=likely_mpi_type(job), environ=environ
    )
    script = ""
    if allocation is None:
        words = words_of(click.get_current_context(), values)
        script = job_script(job, folder, words, environ, profile=known_cluster(job))
    print(as_text(made, script))
    return 0

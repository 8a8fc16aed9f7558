"""``trtllm-launch up``: settings to a plan, a plan to a run. ``--dry-run`` stops after the plan."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from trtllm_workers.cli.common import TABLE_NAMES, explicit, warn
from trtllm_workers.cli.options import GroupedCommand, secret_variables, table_options


@click.command(
    "up",
    cls=GroupedCommand,
    variables=secret_variables(tuple(TABLE_NAMES)),
    epilog="Flags win over variables, variables over defaults; see trtllm-launch plan --show-config.",
)
@table_options(tuple(TABLE_NAMES))
@click.option("--dry-run", is_flag=True, help="Print the commands and start nothing.")
def command(dry_run: bool, **values: Any) -> int:
    """Start an ingress and workers here; Ctrl-C ends them."""
    from trtllm_workers.cli.planning import planned
    from trtllm_workers.config.env import child_environment, environment, wants_colour
    from trtllm_workers.deploy.commands import as_shell
    from trtllm_workers.deploy.output import Terminal
    from trtllm_workers.deploy.ports import require_free_port
    from trtllm_workers.deploy.run import find_runs, run_roots
    from trtllm_workers.deploy.up import run_plan

    environ = environment()
    prepared, plan = planned(explicit(values), environ, to_start=not dry_run)
    warn((*prepared.settings.warnings, *prepared.notes))
    if dry_run:
        print(as_shell(plan))
        return 0
    warn(plan.notes)
    runs = find_runs(run_roots(prepared.settings.run_dir))
    require_free_port(plan.http_host, plan.http_port, runs)
    terminal = Terminal(
        sys.stdout.fileno(),
        colour=wants_colour(environ, sys.stdout.isatty()),
        names=[process.name for process in plan.processes],
    )
    settings = prepared.settings
    strategy = f", strategy {settings.strategy}" if settings.disaggregated else ""
    try:
        terminal.say(
            f"run {plan.run_id}: {plan.model} with engine {settings.engine}, "
            f"{plan.workers_in_words}{strategy}"
        )
        return asyncio.run(run_plan(plan, child_environment(), terminal))
    finally:
        terminal.close()

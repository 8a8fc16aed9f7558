"""``trtllm-launch plan``: what would be started, and which setting came from where."""

from __future__ import annotations

from typing import Any

import click

from trtllm_workers.cli.common import TABLE_NAMES, explicit, warn
from trtllm_workers.cli.options import GroupedCommand, secret_variables, table_options


@click.command("plan", cls=GroupedCommand, variables=secret_variables(tuple(TABLE_NAMES)))
@table_options(tuple(TABLE_NAMES))
@click.option("--show-config", is_flag=True, help="Print every setting with its source instead.")
def command(show_config: bool, **values: Any) -> int:
    """Print the commands that 'up' would start."""
    from trtllm_workers.cli.planning import planned
    from trtllm_workers.config.engine_config import show_config as show_engine_config
    from trtllm_workers.config.env import environment
    from trtllm_workers.config.settings import show_settings
    from trtllm_workers.deploy.commands import as_shell

    prepared, plan = planned(explicit(values), environment(), to_start=False)
    warn((*prepared.settings.warnings, *prepared.notes))
    if show_config:
        tables = [f"launcher settings\n\n{show_settings(prepared.settings)}"]
        for role, config in prepared.engine_configs.items():
            whose = f" of {role} workers" if len(prepared.engine_configs) > 1 else ""
            tables.append(
                f"engine config{whose} ({prepared.settings.engine})\n\n{show_engine_config(config)}"
            )
        print("\n\n".join(tables))
    else:
        print(as_shell(plan))
    return 0

"""``trtllm-launch etcd``: the etcd of a job that has no other; 'slurm run' starts it. Not listed in help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trtllm_workers.cli.common import explicit
from trtllm_workers.cli.options import (
    GroupedCommand,
    own_options,
    secret_variables,
    table_options,
)
from trtllm_workers.cli.part import STATUS_FILE
from trtllm_workers.config.options import Option
from trtllm_workers.deploy.names import ETCD_OPTIONS

FOLDER = Option(
    name="folder",
    flag="--folder",
    env=(),
    default=Path("etcd"),
    kind=Path,
    metavar="DIR",
    help="Where it keeps its data, on this host; removed before and after.",
    group="",
)
HOST = Option(
    name="host",
    flag="--host",
    env=(),
    default="127.0.0.1",
    kind=str,
    metavar="HOST",
    help="Address it listens on.",
    group="",
)


@click.command("etcd", cls=GroupedCommand, variables=secret_variables(ETCD_OPTIONS))
@table_options(ETCD_OPTIONS)
@own_options(FOLDER, HOST, STATUS_FILE)
def command(**values: Any) -> int:
    """Run an etcd for one job."""
    import asyncio

    from trtllm_workers.cli.part import begin_logs, own_value
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.etcd import etcd_password, run_etcd
    from trtllm_workers.deploy.prepare import prepare_settings
    from trtllm_workers.errors import ConfigError
    from trtllm_workers.observe.status import StatusFile

    status = StatusFile(own_value(STATUS_FILE, values["status_file"]))
    status.report("starting")
    settings = prepare_settings(explicit(values), environment(), only=ETCD_OPTIONS)
    begin_logs("etcd", settings)
    if settings.cluster_secret is None:
        raise ConfigError(
            "an etcd for one job needs CLUSTER_SECRET: its password is made from it",
            param="cluster_secret",
        )
    folder = own_value(FOLDER, values["folder"]).absolute()
    password = etcd_password(settings.cluster_secret.encode())
    asyncio.run(run_etcd(folder, own_value(HOST, values["host"]), password, status))
    return 0

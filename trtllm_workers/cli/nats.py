"""``trtllm-launch nats``: the NATS server of a run that has no other; 'up' starts it. Not listed in help."""

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
from trtllm_workers.deploy.names import NATS_OPTIONS

FOLDER = Option(
    name="folder",
    flag="--folder",
    env=(),
    default=Path("nats"),
    kind=Path,
    metavar="DIR",
    help="Where it keeps its config file and what is queued; no other process may use it.",
    group="",
)


HOST = Option(
    name="host",
    flag="--host",
    env=(),
    default="127.0.0.1",
    kind=str,
    metavar="HOST",
    help="Address it listens on; workers on other hosts need one that they reach.",
    group="",
)


@click.command("nats", cls=GroupedCommand, variables=secret_variables(NATS_OPTIONS))
@table_options(NATS_OPTIONS)
@own_options(FOLDER, HOST, STATUS_FILE)
def command(**values: Any) -> int:
    """Run a NATS server for the prefill queue of one run."""
    import asyncio

    from trtllm_workers.cli.part import begin_logs, own_value, secret_of
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.nats import run_nats
    from trtllm_workers.deploy.prepare import prepare_settings
    from trtllm_workers.observe.status import StatusFile
    from trtllm_workers.planes.queue import queue_token

    status = StatusFile(own_value(STATUS_FILE, values["status_file"]))
    status.report("starting")
    settings = prepare_settings(explicit(values), environment(), only=NATS_OPTIONS)
    begin_logs("nats", settings)
    secret = secret_of(settings)
    folder = own_value(FOLDER, values["folder"]).absolute()
    host = own_value(HOST, values["host"])
    asyncio.run(run_nats(folder, queue_token(secret), status, host))
    return 0

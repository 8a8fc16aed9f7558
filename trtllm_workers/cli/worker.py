"""``trtllm-launch worker``: flags and variables to ``WorkerSettings``, then serve."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trtllm_workers.cli.common import explicit, warn, warn_alone
from trtllm_workers.cli.options import (
    GroupedCommand,
    own_options,
    secret_variables,
    table_options,
)
from trtllm_workers.cli.part import ADVERTISE_HOST, DRY_RUN_HELP, STATUS_FILE
from trtllm_workers.config.options import Option
from trtllm_workers.deploy.names import WORKER_OPTIONS
from trtllm_workers.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_workers.config.settings import Settings
    from trtllm_workers.worker.queue_end import PrefillQueue

WORKER_ID = Option(
    name="worker_id",
    flag="--worker-id",
    env=(),
    default="worker-0",
    kind=str,
    metavar="NAME",
    help="Name of this worker; no two under one discovery URL may share it.",
    group="workers",
)
ROLE = Option(
    name="role",
    flag="--role",
    env=(),
    default="aggregated",
    kind=str,
    choices=("aggregated", "prefill", "decode", "encode"),
    help="What it does; each role takes the engine config that 'up' gives it. encode: only images.",
    group="workers",
)
ENCODES = Option(
    name="encodes",
    flag="--encodes",
    env=(),
    default=None,
    default_text="on, but off for decode workers",
    kind=str,
    choices=("on", "off"),
    help="Whether it encodes images itself and loads the vision tower; off: encode workers do.",
    group="images",
)
HOST = Option(
    name="host",
    flag="--host",
    env=(),
    default=None,
    default_text="--plane-host",
    kind=str,
    metavar="HOST",
    help="The same, for this worker alone.",
    group="planes",
)
PORT = Option(
    name="port",
    flag="--port",
    env=(),
    default=0,
    kind=int,
    minimum=0,
    maximum=65535,
    metavar="PORT",
    help="Port where requests arrive; 0 takes a free one.",
    group="planes",
)
NATS_STATUS_FILE = Option(
    name="nats_status_file",
    flag="--nats-status-file",
    env=(),
    default=None,
    default_text="none",
    kind=Path,
    metavar="FILE",
    help="Where the NATS server of this run tells its address; 'up' starts one.",
    group="planes",
)


def _prefill_queue(
    settings: Settings, role: str, secret: bytes, nats_status: Path | None
) -> PrefillQueue | None:
    """Return which prefill queue to take part in; None: none."""
    if settings.prefill_dispatch != "queue" or role not in ("prefill", "decode"):
        return None
    from trtllm_workers.config.outside import NatsLogin, nats_login, parse_nats
    from trtllm_workers.planes.queue import queue_token
    from trtllm_workers.worker.queue_end import PrefillQueue

    queue = partial(
        PrefillQueue,
        namespace=settings.namespace,
        model=settings.served_model_name,
        max_size=settings.max_prefill_queue_size,
    )
    if settings.nats_server is not None:
        return queue(servers=parse_nats(settings.nats_server), login=nats_login(settings))
    if nats_status is None:
        raise ConfigError(
            "say where the prefill queue is: --nats-server nats://host:4222, the same for every worker "
            "('trtllm-launch up' starts a server by itself)",
            param="nats_server",
        )
    return queue(
        status_file=nats_status,
        start_timeout_s=settings.start_timeout_s,
        login=NatsLogin(token=queue_token(secret)),
        storage="memory",  # such a server ends with the run
    )


def _encodes(settings: Settings, role: str, told: str | None) -> bool:
    """Return whether a worker of this role makes embeddings. Raises ConfigError for one that must."""
    if role == "encode" and told == "off":
        raise ConfigError(
            "--encodes: off, but --role is encode; take one of the two back", param="encodes"
        )
    if role == "encode" and settings.modality == "text":
        raise ConfigError(
            f"--role encode needs a model with a vision tower, and {settings.model_path} is served for text "
            f"only (modality {settings.modality}: {settings.sources['modality']})",
            param="role",
        )
    return told == "on" if told else role != "decode"


def _transport(settings: Settings, role: str) -> str:
    """Return the transport; where no KV moves, and none was asked for, the best there is."""
    moves_kv = role in ("prefill", "decode") and settings.engine != "trtllm"
    return settings.kv_transport if moves_kv or _given(settings, "kv_transport") else "auto"


def _given(settings: Settings, name: str) -> bool:
    return settings.sources[name] != "default"


def _engine_options(settings: Settings, role: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the engine is told besides its config; see ``EngineOptions.extra``."""
    if settings.engine != "trtllm":
        cost = settings.sim_cost_model
        return {"cost_path": str(cost)} if cost else {}
    from trtllm_workers.config.env import PROCESS_LOG

    found = {
        "role": role,
        "loras": json.dumps({name: str(folder.absolute()) for name, folder in settings.lora}),
    }
    if log := environ.get(PROCESS_LOG, ""):
        # What stands in it already is an earlier process's.
        found |= {"log": log, "log_begin": str(os.path.getsize(log) if os.path.exists(log) else 0)}
    return found


class _WorkerCommand(GroupedCommand):
    """A command whose arguments may come in a variable, where a program would split them on its way."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from trtllm_workers.config.env import arguments, environment

        return super().parse_args(ctx, arguments(args, environment()))


@click.command("worker", cls=_WorkerCommand, variables=secret_variables(WORKER_OPTIONS))
@table_options(WORKER_OPTIONS)
@own_options(WORKER_ID, ROLE, ENCODES, HOST, PORT, ADVERTISE_HOST, STATUS_FILE, NATS_STATUS_FILE)
@click.option("--dry-run", is_flag=True, help=DRY_RUN_HELP)
def command(dry_run: bool, **values: Any) -> int:
    """Run one worker: an engine behind the request plane."""
    from trtllm_workers.cli.part import (
        begin_logs,
        discovery_of,
        facts_file,
        launcher_teller,
        meeting_points,
        own_value,
        run_loop,
        secret_of,
    )
    from trtllm_workers.cli.world import follow, rank_in_world
    from trtllm_workers.config.env import (
        WORLD_SIZE,
        apply_rank_environment,
        calm_openmp,
        mpi_rank,
        rank_in_step,
    )
    from trtllm_workers.config.images import TEXT, media_settings
    from trtllm_workers.config.outside import etcd_login, tls_files
    from trtllm_workers.config.settings import show_settings
    from trtllm_workers.deploy.names import worker_options
    from trtllm_workers.deploy.prepare import prepare_worker
    from trtllm_workers.observe.status import StatusFile, rank_status
    from trtllm_workers.types import Role

    environ = apply_rank_environment()
    calm_openmp()
    status_file = own_value(STATUS_FILE, values["status_file"])
    if mpi_rank(environ) == 0:  # the others must not write over what it reports
        StatusFile(status_file).report("starting")
    role, host, port = (own_value(one, values[one.name]) for one in (ROLE, HOST, PORT))
    prepared = prepare_worker(explicit(values), environ, Role(role))
    host = host or prepared.settings.plane_host
    settings, engine_config = prepared.settings, prepared.engine_configs[Role(role)]
    worker_id = own_value(WORKER_ID, values["worker_id"])
    encodes = _encodes(settings, role, own_value(ENCODES, values["encodes"]))
    discovery = discovery_of(settings)
    if dry_run:
        warn((*settings.warnings, *prepared.notes))
        print(show_settings(settings, worker_options(Role(role))))
        return 0
    extra = _engine_options(settings, role, environ)
    facts = facts_file(status_file, environ, role, rank_in_step(environ))
    facts.write("start")  # before the ranks wait for each other, in case they do for ever
    if WORLD_SIZE in environ and mpi_rank(environ) == 0:  # a world that never forms is told as such
        ranks = f"MPI world of {environ[WORLD_SIZE]} ranks"
        StatusFile(status_file).report("starting", detail=ranks)
    rank = rank_in_world(engine_config)
    if rank > 0:
        facts_file(status_file, environ, role, rank).write("start")
        begin_logs(f"{worker_id} rank {rank}", settings)
        if status_file is not None:
            StatusFile(rank_status(status_file, rank)).report("following", detail="rank 0")
        follow(settings, engine_config, extra)
        return 0
    warn_alone((*settings.warnings, *prepared.notes), environ)
    begin_logs(worker_id, settings)

    # These take a moment to load; everything that could be wrong was found before.
    from trtllm_workers.planes.advertise import advertised_host
    from trtllm_workers.worker.serve import WorkerSettings, serve_worker

    secret = secret_of(settings)
    reached_at = advertised_host(
        host, own_value(ADVERTISE_HOST, values["advertise_host"]), meeting_points(settings)
    )
    nats_status = own_value(NATS_STATUS_FILE, values["nats_status_file"])
    run_loop(
        serve_worker(
            WorkerSettings(
                worker_id=worker_id,
                model_path=settings.model_path,
                served_model_name=settings.served_model_name,
                engine=settings.engine,
                engine_config=engine_config,
                discovery=discovery,
                secret=secret,
                namespace=settings.namespace,
                etcd=etcd_login(settings),
                plane_tls=tls_files(settings, "plane"),
                role=Role(role),
                host=host,
                port=port,
                advertise_host=reached_at,
                status_file=status_file,
                drain_timeout_s=settings.drain_timeout_s,
                kv_transport=_transport(settings, role),
                max_local_prefill_length=settings.max_local_prefill_length,
                canary_interval_s=settings.canary_interval_s,
                prefill_timeout_s=settings.prefill_timeout_s,
                handoff_min_timeout_s=settings.handoff_min_timeout_s,
                handoff_max_timeout_s=settings.handoff_max_timeout_s,
                stall_timeout_s=settings.stall_timeout_s,
                tells_launcher_to_stop=launcher_teller(environ),
                on_loaded=partial(facts.write, "ready", reached_at),
                prefill_queue=_prefill_queue(settings, role, secret, nats_status),
                media=media_settings(settings),
                encodes=encodes,
                takes_images=settings.modality != TEXT,
                extra=extra,
            )
        )
    )
    return 0

"""``trtllm-launch ingress``: flags and variables to ``IngressSettings``, then serve."""

from __future__ import annotations

from typing import Any

import click

from trtllm_workers.cli.common import explicit, warn_alone
from trtllm_workers.cli.options import (
    GroupedCommand,
    own_options,
    secret_variables,
    table_options,
)
from trtllm_workers.cli.part import ADVERTISE_HOST, DRY_RUN_HELP, STATUS_FILE
from trtllm_workers.config.options import Option
from trtllm_workers.deploy.names import INGRESS_OPTIONS

PLANE_PORT = Option(
    name="plane_port",
    flag="--plane-port",
    env=(),
    default=0,
    kind=int,
    minimum=0,
    maximum=65535,
    metavar="PORT",
    help="Port where workers' tokens arrive; 0 takes a free one.",
    group="planes",
)


@click.command("ingress", cls=GroupedCommand, variables=secret_variables(INGRESS_OPTIONS))
@table_options(INGRESS_OPTIONS)
@own_options(PLANE_PORT, ADVERTISE_HOST, STATUS_FILE)
@click.option("--dry-run", is_flag=True, help=DRY_RUN_HELP)
def command(dry_run: bool, **values: Any) -> int:
    """Run one ingress: the OpenAI-compatible HTTP process."""
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
    from trtllm_workers.config.env import environment
    from trtllm_workers.config.outside import etcd_login, tls_files
    from trtllm_workers.config.settings import show_settings
    from trtllm_workers.deploy.prepare import prepare_settings
    from trtllm_workers.observe.status import StatusFile

    environ = environment()
    status_file = own_value(STATUS_FILE, values["status_file"])
    StatusFile(status_file).report("starting")
    settings = prepare_settings(explicit(values), environ, only=INGRESS_OPTIONS)
    warn_alone(settings.warnings, environ)
    discovery = discovery_of(settings)
    if dry_run:
        print(show_settings(settings, INGRESS_OPTIONS))
        return 0
    facts = facts_file(status_file, environ, "ingress")
    facts.write("start")
    begin_logs("ingress", settings)
    plane_host = settings.plane_host
    plane_port = own_value(PLANE_PORT, values["plane_port"])

    # These load for half a second; everything that could be wrong was found before.
    from trtllm_workers.ingress.serve import serve_ingress
    from trtllm_workers.ingress.settings import IngressSettings, RouterSettings
    from trtllm_workers.planes.advertise import advertised_host
    from trtllm_workers.router.policies import RouterMode
    from trtllm_workers.router.weights import Weights
    from trtllm_workers.types import Strategy

    reached_at = advertised_host(
        plane_host, own_value(ADVERTISE_HOST, values["advertise_host"]), meeting_points(settings)
    )
    run_loop(
        serve_ingress(
            IngressSettings(
                discovery=discovery,
                secret=secret_of(settings),
                namespace=settings.namespace,
                etcd=etcd_login(settings),
                plane_tls=tls_files(settings, "plane"),
                http_host=settings.http_host,
                http_port=settings.http_port,
                plane_host=plane_host,
                plane_port=plane_port,
                plane_advertise_host=reached_at,
                strategy=Strategy(settings.strategy),
                router=RouterSettings(
                    RouterMode(settings.router_mode),
                    Weights(
                        overlap=settings.router_overlap_weight,
                        load=settings.router_load_weight,
                        free=settings.router_free_weight,
                        temperature=settings.router_temperature,
                        affinity_cap=settings.router_affinity_cap,
                        ttl_s=settings.router_ttl_s,
                    ),
                    uses_events=settings.router_events == "on",
                ),
                encode_timeout_s=settings.encode_timeout_s,
                drain_timeout_s=settings.drain_timeout_s,
                status_file=status_file,
                tells_launcher_to_stop=launcher_teller(environ),
                on_listening=lambda _host, _port: facts.write("ready", reached_at),
            )
        )
    )
    return 0

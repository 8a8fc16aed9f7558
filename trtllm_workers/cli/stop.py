"""``trtllm-launch stop``: end runs from another terminal, or what a killed launcher left."""

from __future__ import annotations

from typing import Any

import click

from trtllm_workers.cli.options import GroupedCommand, secret_variables, table_options
from trtllm_workers.deploy.names import STOP_OPTIONS


@click.command("stop", cls=GroupedCommand, variables=secret_variables(STOP_OPTIONS))
@click.argument("run_id", required=False)
@table_options(("run_dir", *STOP_OPTIONS))
@click.option("--all", "every", is_flag=True, help="End every run of this user on this host.")
@click.option("--now", is_flag=True, help="Do not wait for running requests.")
@click.option(
    "--all-hosts",
    is_flag=True,
    help="End the deployment that --discovery shows, on all its hosts: drain, TERM, KILL.",
)
def command(
    run_id: str | None,
    run_dir: str | None,
    every: bool,
    now: bool,
    all_hosts: bool,
    **values: Any,
) -> int:
    """End a run, with everything it started.

    Without RUN_ID it ends the only run there is. With --all-hosts it ends a deployment: ingresses first,
    then workers, whoever started them.
    """
    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.run import find_runs
    from trtllm_workers.deploy.stop import choose_runs, stop_run
    from trtllm_workers.errors import ConfigError, EngineDead

    if all_hosts:
        if every or run_id is not None:
            raise ConfigError("give --all-hosts alone: discovery says what it ends", param="run_id")
        return _stop_everywhere(values, now=now)
    if every and run_id is not None:
        raise ConfigError("give a run id or --all, not both", param="run_id")
    roots, elsewhere = roots_of_runs(run_dir, environment())
    # A run that is named is meant, wherever its folder lies.
    runs = find_runs(roots, elsewhere=elsewhere or run_id is not None)
    chosen = choose_runs(runs, run_id, every=every)
    if not chosen:
        print("no run is there")
    left: list[str] = []
    for run in chosen:
        stopped = stop_run(run, roots, hurry=now)
        left += stopped.left
        if stopped.was_stale:
            print(f"run {stopped.run_id}: nothing of it was alive; its records are cleared")
            continue
        if stopped.ended:
            print(f"run {stopped.run_id}: ended {', '.join(stopped.ended)}")
        if stopped.killed:
            print(f"run {stopped.run_id}: killed {', '.join(stopped.killed)}")
    if left:
        raise EngineDead(f"still there: {', '.join(left)}; try again as their owner or as root")
    return 0


def _stop_everywhere(values: dict[str, Any], *, now: bool) -> int:
    import asyncio

    from trtllm_workers.cli.common import explicit
    from trtllm_workers.cli.part import discovery_of, secret_of
    from trtllm_workers.config.env import environment
    from trtllm_workers.config.outside import etcd_login, tls_files
    from trtllm_workers.deploy.prepare import prepare_settings
    from trtllm_workers.deploy.stop_everywhere import Closed, ignore, stop_everywhere
    from trtllm_workers.errors import EngineDead
    from trtllm_workers.observe.logs import setup_logs
    from trtllm_workers.planes.discovery import open_discovery
    from trtllm_workers.planes.mesh import TcpMesh, new_incarnation

    settings = prepare_settings(explicit(values), environment(), only=STOP_OPTIONS)
    setup_logs("stop", fmt="console", level="warning", path=None)
    url = discovery_of(settings)
    secret = secret_of(settings)

    async def close() -> Closed:
        discovery = open_discovery(url, settings.namespace, etcd_login(settings))
        mesh = TcpMesh(
            peer_id="stop",
            incarnation=new_incarnation(),
            secret=secret,
            tls=tls_files(settings, "plane"),
            on_message=ignore,
            on_lost=lambda _peer, _error: None,
        )
        try:
            await mesh.start()
            return await stop_everywhere(
                mesh,
                discovery,
                drain_timeout_s=0.0 if now else settings.drain_timeout_s,
                say=lambda text: print(text, flush=True),
            )
        finally:
            await mesh.close()
            await discovery.close()

    closed = asyncio.run(close())
    if closed.ended:
        print(f"ended {', '.join(closed.ended)}")
    if not (closed.ended or closed.unreachable or closed.left):
        print("discovery shows nothing that runs")
    if closed.left:
        raise EngineDead(
            f"still registered: {', '.join(closed.left)}"
            + (
                f"; not to be reached: {', '.join(closed.unreachable)}"
                if closed.unreachable
                else ""
            )
            + "; is the cluster secret the same, and can their host be reached from here?"
        )
    return 0

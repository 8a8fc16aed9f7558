"""``trtllm-launch stop``: end runs from another terminal, or what a killed launcher left."""

from __future__ import annotations

import click

from trtllm_workers.cli.options import GroupedCommand, table_options


@click.command("stop", cls=GroupedCommand)
@click.argument("run_id", required=False)
@table_options(("run_dir",))
@click.option("--all", "every", is_flag=True, help="End every run of this user on this host.")
@click.option("--now", is_flag=True, help="Do not wait for running requests.")
def command(run_id: str | None, run_dir: str | None, every: bool, now: bool) -> int:
    """End a run, with everything it started.

    Without RUN_ID it ends the only run there is.
    """
    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.run import find_runs
    from trtllm_workers.deploy.stop import choose_runs, stop_run
    from trtllm_workers.errors import ConfigError, EngineDead

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

"""``trtllm-launch gc``: clear what dead runs left on this host."""

from __future__ import annotations

import click

from trtllm_workers.cli.options import GroupedCommand, table_options


@click.command("gc", cls=GroupedCommand)
@table_options(("run_dir",))
@click.option("--run", "run_id", metavar="ID", help="Only that run.")
@click.option(
    "--ended",
    is_flag=True,
    help="Take it that this run has ended, where this host cannot see it; needs --run.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def command(
    run_dir: str | None, run_id: str | None, ended: bool, dry_run: bool, as_json: bool
) -> int:
    """Clear what dead runs left: processes, memory, records, folders.

    Only runs of this user whose launcher is seen to be dead from here; what is worth keeping of them stays
    for 'bundle' and 'diff'. Runs of other hosts and containers are left alone: run gc there.
    """
    from trtllm_workers.cli.common import print_json, roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.garbage import collect_garbage
    from trtllm_workers.errors import ConfigError, EngineDead

    if ended and run_id is None:
        raise ConfigError("--ended is said of one run: give --run ID, too", param="ended")
    roots, elsewhere = roots_of_runs(run_dir, environment())
    found = collect_garbage(roots, run_id, dry_run=dry_run, ended=ended, elsewhere=elsewhere)
    if as_json:
        print_json(found)
    else:
        verbs = ("would end", "would remove") if dry_run else ("ended", "removed")
        for one in found.removed:
            verb = verbs[0] if one.kind == "process" else verbs[1]
            print(f"run {one.run_id}: {verb} {one.kind} {one.what}")
        for spared in found.spared:
            print(f"run {spared.run_id}: left alone: {spared.why}")
        if not found.removed and not found.left:
            print("no dead run has left anything here")
    if found.left:
        left = ", ".join(f"{one.kind} {one.what}" for one in found.left)
        raise EngineDead(f"still there: {left}; try again as root")
    return 0

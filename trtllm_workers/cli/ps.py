"""``trtllm-launch ps``: the runs of this user on this host."""

from __future__ import annotations

import click

from trtllm_workers.cli.options import GroupedCommand, table_options


@click.command("ps", cls=GroupedCommand)
@table_options(("run_dir",))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array for machines.")
def command(run_dir: str | None, as_json: bool) -> int:
    """List runs and their processes."""
    import msgspec

    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.listing import as_table, rows_of
    from trtllm_workers.deploy.run import find_runs

    roots, elsewhere = roots_of_runs(run_dir, environment())
    runs = find_runs(roots, elsewhere=elsewhere)
    rows = rows_of(runs)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
    else:
        print(as_table(rows, runs))
    return 0

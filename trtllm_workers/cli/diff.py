"""``trtllm-launch diff``: what changed between two runs."""

from __future__ import annotations

import click

from trtllm_workers.cli.options import GroupedCommand, table_options

DIFFERS = 1


@click.command("diff", cls=GroupedCommand)
@click.argument("run_a")
@click.argument("run_b")
@table_options(("run_dir",))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def command(run_a: str, run_b: str, run_dir: str | None, as_json: bool) -> int:
    """Say what changed between two runs.

    Compares settings, engine configs, variables, versions, transports and hosts. RUN_A and RUN_B are run
    ids (live, or among the last 20 that ended), folders or bundles. Ends with 0 when nothing changed, with
    1 when something did.
    """
    from trtllm_workers.cli.common import print_json, roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.difference import as_text, compare
    from trtllm_workers.deploy.story import open_story

    roots, _ = roots_of_runs(run_dir, environment())
    found = compare(open_story(roots, run_a), open_story(roots, run_b))
    if as_json:
        print_json(found)
    else:
        print(as_text(found))
    return DIFFERS if found.changes else 0

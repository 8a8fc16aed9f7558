"""``trtllm-launch env-audit``: what the ranks of runs see around them, side by side."""

from __future__ import annotations

import click

from trtllm_workers.cli.options import GroupedCommand, table_options

DIFFERS = 1


@click.command("env-audit", cls=GroupedCommand)
@click.argument("run", nargs=-1)
@table_options(("run_dir",))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
def command(run: tuple[str, ...], run_dir: str | None, as_json: bool) -> int:
    """Compare what the ranks of a run see around them; mark differences.

    Compares variables, libraries, networks and limits. RUN is a run id, a run's folder or a bundle; several
    are compared together, for instance the parts of a deployment that were started host by host. Without RUN
    it is the latest. Ends with 0 when all see the same, with 1 when something differs that should not.
    """
    from trtllm_workers.cli.common import print_json, roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.audit import as_text, audit, names_of
    from trtllm_workers.deploy.observed import with_live
    from trtllm_workers.deploy.story import open_story
    from trtllm_workers.errors import ConfigError

    roots, _ = roots_of_runs(run_dir, environment())
    stories = [open_story(roots, name) for name in run or (None,)]
    facts = [(story.run_id, with_live(story)) for story in stories]
    silent = [run_id for run_id, found in facts if not found]
    if silent:
        raise ConfigError(
            f"no process of run {' and '.join(silent)} has said what it sees; "
            "they do so when they start",
            param="run",
        )
    found = audit(names_of(facts), [story.run_id for story in stories])
    if as_json:
        print_json(found)
    else:
        print("; ".join(story.in_words for story in stories))
        print(as_text(found))
    return DIFFERS if found.differs else 0

"""``trtllm-launch bundle``: one archive of a run for whoever helps."""

from __future__ import annotations

from pathlib import Path

import click

from trtllm_workers.cli.options import GroupedCommand, table_options


@click.command("bundle", cls=GroupedCommand)
@click.argument("run", required=False)
@table_options(("run_dir",))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write it.  [default: trtllm-launch-RUN.tar.gz]",
)
@click.option("--anonymous", is_flag=True, help="Replace the user's name and home folder, too.")
def command(run: str | None, run_dir: str | None, output: Path | None, anonymous: bool) -> int:
    """Pack a run into one archive without secrets, to show to others.

    RUN is a run id; the last 20 that ended are remembered. Without RUN it is the latest. Secrets are taken
    out by name, by value and by look; look through it all the same before you pass it on.
    """
    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.bundle import write_bundle
    from trtllm_workers.deploy.story import open_story

    environ = environment()
    roots, _ = roots_of_runs(run_dir, environ)
    story = open_story(roots, run)
    path = output or Path(f"trtllm-launch-{story.run_id}.tar.gz")
    write_bundle(story, path, environ, hide_user=anonymous)
    print(f"{story.in_words}: {path} ({path.stat().st_size / 1024:.0f} KiB)")
    return 0

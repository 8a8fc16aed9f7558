"""``trtllm-launch slurm probe``: what the SLURM cluster that this host belongs to offers."""

from __future__ import annotations

import click

from trtllm_workers.cli.options import GroupedCommand, table_options


@click.command("probe", cls=GroupedCommand)
@click.option("--partition", metavar="NAME", help="Partition to test.  [default: one with GPUs]")
@click.option("--account", metavar="NAME", help="Account to test with.  [default: your own]")
@click.option(
    "--gpus",
    "num_gpus",
    metavar="N",
    type=click.IntRange(1, 1024),
    help="GPUs of a node to test with.  [default: all]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for machines.")
@click.option("--no-save", is_flag=True, help="Do not keep the answers for 'slurm run'.")
@table_options(("run_dir",))
def probe(
    partition: str | None,
    account: str | None,
    num_gpus: int | None,
    as_json: bool,
    no_save: bool,
    run_dir: str | None,
) -> int:
    """Ask a SLURM cluster what it offers; no job is submitted.

    Tests each directive with 'sbatch --test-only' and keeps the answers, which 'slurm run' goes by. Ends
    with 0 when a job would be accepted.
    """
    import asyncio
    import time

    import msgspec

    from trtllm_workers.cli.common import roots_of_runs
    from trtllm_workers.config.env import environment
    from trtllm_workers.deploy.run import usable_root
    from trtllm_workers.deploy.slurm.cluster import probe as ask_cluster
    from trtllm_workers.deploy.slurm.cluster import profile_path, save
    from trtllm_workers.deploy.slurm.command import run_command
    from trtllm_workers.deploy.slurm.showing import as_text
    from trtllm_workers.errors import ConfigError

    found = asyncio.run(
        ask_cluster(run_command, partition=partition, account=account, num_gpus=num_gpus)
    )
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        print(as_text(found, now_s=time.time(), account=account, num_gpus=num_gpus))
    if not found.takes_jobs:
        return ConfigError.exit_code  # nothing was learnt that would be worth keeping
    if not no_save:
        (root, *_), is_default = roots_of_runs(run_dir, environment())
        path = profile_path(usable_root(root, chosen=not is_default), found.cluster_name)
        save(found, path)
        if not as_json:
            print(f"\nkept in {path}")
    return 0

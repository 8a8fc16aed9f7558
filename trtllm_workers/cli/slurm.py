"""``trtllm-launch slurm``: the verbs of a run on a SLURM cluster, each imported when it is used."""

from __future__ import annotations

import importlib

import click

from trtllm_workers.config.spelling import nearest
from trtllm_workers.errors import ConfigError

# Verb → its one line of help; cli/slurm_VERB.py holds `command`.
VERBS = {
    "plan": "Print what a run would ask of SLURM: the job script and every srun.",
    "run": "Start ingress and workers in this allocation, or submit a job that does.",
    "status": "Show jobs and how far each worker and rank has come.",
    "stop": "End a run: drain, clear its nodes, give its job back.",
    "probe": "Find out what this cluster accepts, and keep it.",
}
# Started by multinode/start_trtllm_worker.sh alone.
_INTERNAL = ("worker",)


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS and cmd_name not in _INTERNAL:
            return None
        module = importlib.import_module(f"trtllm_workers.cli.slurm_{cmd_name}")
        command: click.Command = getattr(module, "command", None) or getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in (*VERBS, *_INTERNAL) and not args[0].startswith("-"):
            near = nearest(args[0], VERBS)
            hint = f"did you mean '{near}'?" if near else f"there are: {', '.join(VERBS)}"
            raise ConfigError(f"unknown command 'slurm {args[0]}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    "slurm",
    cls=_Verbs,
    epilog="First steps: trtllm-launch slurm probe, then slurm plan; the guide is multinode/README.md.",
)
def command() -> None:
    """Run on SLURM: plan, run, status, stop, probe."""

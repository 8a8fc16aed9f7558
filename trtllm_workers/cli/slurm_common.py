"""What the verbs of ``slurm`` that plan a job share: their options, and a folder for the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from trtllm_workers.cli.common import TABLE_NAMES
from trtllm_workers.cli.options import own_options, table_options
from trtllm_workers.config.settings import Settings
from trtllm_workers.config.slurm_options import SLURM_OPTIONS
from trtllm_workers.deploy.run import RunFolder, new_run_id, usable_root

F = TypeVar("F", bound=Callable[..., Any])

# These say how ranks start and which GPUs a role has on one host; srun says it here.
_NOT_HERE = frozenset(
    {"mpi_launch", "mpi_cmd", "prefill_cuda_visible_devices", "decode_cuda_visible_devices"}
)
RUN_DIR_HELP = (
    "Where runs keep their records.  [default: ~/.local/state/trtllm-launch; env: RUN_DIR]"
)
JOB_NAMES = tuple(sorted(TABLE_NAMES - _NOT_HERE))
_OF_JOBS = frozenset(option.name for option in SLURM_OPTIONS)


def job_options(function: F) -> F:
    """Decorate a command with the options of a whole run and those of a job."""
    return table_options(JOB_NAMES)(own_options(*SLURM_OPTIONS)(function))


def given_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given on the command line."""
    return {
        name: value
        for name, value in values.items()
        if name in (*JOB_NAMES, *_OF_JOBS) and value is not None and value != ()
    }


def words_of(ctx: click.Context, values: Mapping[str, Any]) -> list[str]:
    """Return the command line again, as the job script says it: the same options in their order."""
    flags = {
        param.name: param.opts[0]
        for param in ctx.command.params
        if isinstance(param, click.Option) and param.name
    }
    words: list[str] = []
    for name, value in given_of(values).items():
        if isinstance(value, bool):
            words += [flags[name]] if value else []
            continue
        for one in value if isinstance(value, tuple) else (value,):
            text = str(one)
            words += [f"{flags[name]}={text}"] if text.startswith("-") else [flags[name], text]
    return words


def run_folder(settings: Settings, run_id: str | None, *, to_start: bool) -> RunFolder:
    """Return the folder of a new run; only one ``to_start`` makes the folder for runs."""
    root = settings.run_dir.absolute()
    if to_start:
        root = usable_root(settings.run_dir, chosen=settings.sources["run_dir"] != "default")
    return RunFolder(root / (run_id or new_run_id(root)))

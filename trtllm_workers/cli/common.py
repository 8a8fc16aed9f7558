"""What several commands share: the flags that were given, warnings, where runs are kept."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trtllm_workers.config.env import read_text, state_dir
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.deploy.run import RUN_ID, run_roots

TABLE_NAMES = frozenset(option.name for option in LAUNCH_OPTIONS)


def explicit(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the settings table that were given on the command line."""
    return {
        name: value
        for name, value in values.items()
        if name in TABLE_NAMES and value is not None and value != ()
    }


def warn(warnings: Collection[str]) -> None:
    """Show warnings on standard error."""
    for warning in warnings:
        print(f"trtllm-launch: note: {warning}", file=sys.stderr)


def warn_alone(warnings: Collection[str], environ: Mapping[str, str]) -> None:
    """Show warnings, unless the launcher that started this process has shown them already."""
    if RUN_ID not in environ:
        warn(warnings)


def print_json(value: Any) -> None:
    """Print a value for machines."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def roots_of_runs(given: str | None, environ: Mapping[str, str]) -> tuple[list[Path], bool]:
    """Return where to look for runs, and whether runs that lie elsewhere count too.

    A run directory that was named holds all that is meant; two of them do not see each other. Other
    settings may be wrong without harm to ps and stop.
    """
    variables = next(option.env for option in LAUNCH_OPTIONS if option.name == "run_dir")
    found = read_text(variables, environ)
    named = given or (found[1] if found else None)
    if named:
        return [Path(named).expanduser().absolute()], False
    return run_roots(state_dir(environ)), True

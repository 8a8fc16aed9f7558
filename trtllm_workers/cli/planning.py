"""Flags and variables to a plan; what ``up`` and ``plan`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm_workers.deploy.inventory import take_inventory
from trtllm_workers.deploy.plan import Plan, make_plan
from trtllm_workers.deploy.prepare import Prepared, prepare
from trtllm_workers.deploy.run import RunFolder, new_run_id, usable_root


def planned(
    given: Mapping[str, Any], environ: Mapping[str, str], *, to_start: bool
) -> tuple[Prepared, Plan]:
    """Return checked settings and the plan made of them. Raises ConfigError.

    Only a plan ``to_start`` makes the folder for runs; one to look at leaves nothing behind.
    """
    prepared = prepare(given, environ, to_start=to_start)
    settings = prepared.settings
    root = settings.run_dir.absolute()
    if to_start:
        root = usable_root(settings.run_dir, chosen=settings.sources["run_dir"] != "default")
    folder = RunFolder(root / new_run_id(root))
    plan = make_plan(
        settings, take_inventory(environ, settings.engine), folder, prepared.engine_configs
    )
    return prepared, plan

"""Flags and variables to checked settings: everything that can be found wrong before a start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trtllm_workers.config.disaggregation import require_same_blocks, require_same_rows
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings, resolve
from trtllm_workers.demo import DEMO_MODEL_NAME, demo_model_path
from trtllm_workers.deploy.engine_configs import load_engine_configs
from trtllm_workers.deploy.names import ENGINE_CONFIG_OF, roles_of, worker_options
from trtllm_workers.deploy.trtllm_facts import find_facts, quick_facts
from trtllm_workers.deploy.trtllm_host import choose_engine, require_trtllm
from trtllm_workers.types import Role


@dataclass(frozen=True, slots=True)
class Prepared:
    """Settings of the launcher and of each role's engine, each value checked and with its source.

    ``notes`` say what of the engine configs deserves the operator's eyes.
    """

    settings: Settings
    engine_configs: Mapping[Role, EngineConfig]
    notes: tuple[str, ...] = ()


def prepare(
    explicit: Mapping[str, Any], environ: Mapping[str, str], *, to_start: bool = False
) -> Prepared:
    """Return what a start of a whole run needs. Raises ConfigError naming every problem at once.

    Only ``to_start`` must this host have what the engine needs; a plan may be made anywhere.
    """
    settings = prepare_settings(explicit, environ)
    files = {role: getattr(settings, ENGINE_CONFIG_OF[role]) for role in roles_of(settings)}
    loaded = load_engine_configs(settings, files, environ)
    configs = loaded.configs
    if settings.disaggregated and settings.engine != "trtllm":  # whose linter compares more
        require_same_blocks(configs[Role.PREFILL], configs[Role.DECODE])
    if settings.engine != "trtllm":
        require_same_rows(configs)
    if to_start and settings.engine == "trtllm":
        require_trtllm(settings, configs, find_facts(environ))
    return Prepared(settings, configs, loaded.notes)


def prepare_worker(explicit: Mapping[str, Any], environ: Mapping[str, str], role: Role) -> Prepared:
    """Return what one worker needs: variables that mean nothing to its role are not looked at.

    Without ``--engine-config`` it takes the config of its role. Raises ConfigError.
    """
    option = ENGINE_CONFIG_OF[role]
    only = [name for name in worker_options(role) if name != "engine_config"]
    settings = prepare_settings(explicit, environ, only=[*only, option])
    name = "engine_config" if explicit.get("engine_config") is not None else option
    loaded = load_engine_configs(settings, {role: getattr(settings, name)}, environ)
    return Prepared(settings, loaded.configs, loaded.notes)


def prepare_settings(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str],
    only: Collection[str] | None = None,
) -> Settings:
    """Return the launcher's settings; ``only`` names the options whose variables are looked at.

    A process that takes no model must not fail because a variable names a wrong one.
    """
    if only is not None:
        others = {name for one in LAUNCH_OPTIONS if one.name not in only for name in one.env}
        environ = {name: value for name, value in environ.items() if name not in others}
    return resolve(
        explicit,
        environ,
        demo=(demo_model_path(), DEMO_MODEL_NAME),
        with_model=only is None or "model_path" in only,
        of_one_part=only is not None,
        auto_engine=lambda: choose_engine(quick_facts(environ)),
    )

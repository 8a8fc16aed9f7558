"""Flags and variables to checked settings: everything that can be found wrong before a start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_workers.config.disaggregation import require_same_blocks
from trtllm_workers.config.engine_config import load_engine_config
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings, resolve
from trtllm_workers.demo import DEMO_MODEL_NAME, demo_model_path
from trtllm_workers.deploy.names import ENGINE_CONFIG_OF, worker_options
from trtllm_workers.engines.registry import engine_keys
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role


@dataclass(frozen=True, slots=True)
class Prepared:
    """Settings of the launcher and of each role's engine, each value checked and with its source."""

    settings: Settings
    engine_configs: Mapping[Role, EngineConfig]


def prepare(explicit: Mapping[str, Any], environ: Mapping[str, str]) -> Prepared:
    """Return what a start of a whole run needs. Raises ConfigError naming every problem at once."""
    settings = prepare_settings(explicit, environ)
    roles = (Role.PREFILL, Role.DECODE) if settings.disaggregated else (Role.AGGREGATED,)
    configs: dict[Role, EngineConfig] = {}
    wrong: list[ConfigError] = []
    for role in roles:
        try:
            configs[role] = _engine_config(settings, getattr(settings, ENGINE_CONFIG_OF[role]))
        except ConfigError as error:
            wrong.append(error)
    if wrong:
        # One file for both roles, or one --set, is wrong once.
        texts = dict.fromkeys(str(error) for error in wrong)
        raise ConfigError("\n".join(texts), param=wrong[0].param) from wrong[0]
    if settings.disaggregated:
        require_same_blocks(configs[Role.PREFILL], configs[Role.DECODE])
    return Prepared(settings, configs)


def prepare_worker(explicit: Mapping[str, Any], environ: Mapping[str, str], role: Role) -> Prepared:
    """Return what one worker needs: variables that mean nothing to its role are not looked at.

    Without ``--engine-config`` it takes the config of its role. Raises ConfigError.
    """
    option = ENGINE_CONFIG_OF[role]
    only = [name for name in worker_options(role) if name != "engine_config"]
    settings = prepare_settings(explicit, environ, only=[*only, option])
    name = "engine_config" if explicit.get("engine_config") is not None else option
    return Prepared(settings, {role: _engine_config(settings, getattr(settings, name))})


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
    )


def _engine_config(settings: Settings, path: Path | None) -> EngineConfig:
    keys = engine_keys(settings.engine)
    return load_engine_config(settings.engine, keys, path, settings.overrides)

"""Flags and variables to checked settings: everything that can be found wrong before a start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trtllm_workers.config.engine_config import load_engine_config
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings, resolve
from trtllm_workers.demo import DEMO_MODEL_NAME, demo_model_path
from trtllm_workers.engines.registry import engine_keys


@dataclass(frozen=True, slots=True)
class Prepared:
    """Settings of the launcher and of the engine, each value checked and with its source."""

    settings: Settings
    engine_config: EngineConfig


def prepare(explicit: Mapping[str, Any], environ: Mapping[str, str]) -> Prepared:
    """Return what a start needs. Raises ConfigError naming every problem at once."""
    settings = prepare_settings(explicit, environ)
    keys = engine_keys(settings.engine)
    config = load_engine_config(settings.engine, keys, settings.engine_config, settings.overrides)
    return Prepared(settings, config)


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
    )

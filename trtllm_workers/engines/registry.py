"""Engine names and where their parts live. Imports an engine only when asked for it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from trtllm_workers.config.keys import Key
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EngineEntry:
    """Import paths: ``keys`` is light (no torch), ``build`` may be heavy.

    ``keys`` None: the engine takes every key of TensorRT-LLM's schema, and ``lint/`` checks them.
    """

    keys: str | None
    build: str


ENGINES: dict[str, EngineEntry] = {
    "sim": EngineEntry(
        keys="trtllm_workers.engines.sim.settings:KEYS",
        build="trtllm_workers.engines.sim.engine:build",
    ),
    "torch": EngineEntry(
        keys="trtllm_workers.engines.torch.settings:KEYS",
        build="trtllm_workers.engines.torch.engine:build",
    ),
    "trtllm": EngineEntry(
        keys=None,
        build="trtllm_workers.engines.trtllm.engine:build",
    ),
}


# The engines that say which keys they honour.
KEYED_ENGINES = tuple(name for name, entry in ENGINES.items() if entry.keys)


def _entry(name: str) -> EngineEntry:
    try:
        return ENGINES[name]
    except KeyError:
        raise ConfigError(
            f"unknown engine '{name}'; choose one of: auto, {', '.join(sorted(ENGINES))}",
            param="engine",
        ) from None


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def engine_keys(name: str) -> Mapping[str, Key]:
    """Return the engine-config keys that an engine of ``KEYED_ENGINES`` honours, without importing it."""
    keys = _entry(name).keys
    assert keys is not None, f"engine {name} takes TensorRT-LLM's own keys"
    return cast("Mapping[str, Key]", _load(keys))


def build_engine(name: str, options: EngineOptions) -> Engine:
    """Build an engine (not started). Raises ConfigError naming the package to install."""
    entry = _entry(name)
    try:
        return cast("Engine", _load(entry.build)(options))
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"engine '{name}' needs the Python package '{missing.name}', which is not installed; "
            f"run: pip install 'trtllm-launch[{name}]'",
            param="engine",
        ) from missing

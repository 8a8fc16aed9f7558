"""What an engine says about each engine-config key it honours. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Key:
    """One key of an engine config, named as TensorRT-LLM names it (dotted for nested sections).

    ``kind`` is int, float, bool or str; an int is accepted for a float. ``minimum`` and ``maximum``
    are inclusive. ``optional`` allows null. ``help`` is one line for ``--show-config``.
    """

    kind: type
    default: Any
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it came from: a flag, a variable, ``file.yaml:7``, or ``default``."""

    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The settings of one engine, by dotted key; every honoured key is present.

    ``without_effect`` names what was given ("key (file:line)") that tells TensorRT-LLM how to work and
    means nothing to this engine.
    """

    engine: str
    settings: Mapping[str, Setting]
    without_effect: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.settings[key].value

    def source(self, key: str) -> str:
        """Return where the value of ``key`` came from, for messages."""
        return self.settings[key].source


def default_config(engine: str, keys: Mapping[str, Key], **overrides: Any) -> EngineConfig:
    """Return the defaults of ``keys``; ``overrides`` use ``__`` for the dot (for tests, benchmarks).

    Raises KeyError for an override that is no key.
    """
    settings = {name: Setting(key.default, "default") for name, key in keys.items()}
    for name, value in overrides.items():
        dotted = name.replace("__", ".")
        if dotted not in settings:
            raise KeyError(dotted)
        settings[dotted] = Setting(value, "override")
    return EngineConfig(engine, settings)

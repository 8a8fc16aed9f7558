"""A checked document as the engine's config, and back to the nested keys that TensorRT-LLM takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.lint.document import Document


def as_engine_config(
    document: Document, instead: Mapping[str, Setting] | None = None
) -> EngineConfig:
    """Return the settings of a document: as given, else ``instead``, else TensorRT-LLM's defaults.

    Sections that are off have no settings but their own, which is null.
    """
    off = [key for key, value in document.values.items() if value is None]
    settings = {
        key: Setting(default, "default")
        for key, default in document.defaults.items()
        if not any(key.startswith(f"{section}.") for section in off)
    }
    settings |= instead or {}
    settings |= {
        key: Setting(value, document.place(key).source) for key, value in document.values.items()
    }
    return EngineConfig("trtllm", settings)


def nested(config: EngineConfig) -> dict[str, Any]:
    """Return what was given, as nested mappings; what is TensorRT-LLM's default is left to it."""
    found: dict[str, Any] = {}
    for key, setting in sorted(config.settings.items()):
        if setting.source == "default":
            continue
        *sections, last = key.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = setting.value
    return found

"""Engine settings from YAML and overrides, checked against an engine's keys. Starts no engine.

Layers: flag over environment over YAML over default; every value keeps its source. Every problem
of a file and of the overrides is reported at once, each on its line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_workers.config.keys import EngineConfig, Key, Setting
from trtllm_workers.config.schema import Schema, trtllm_schema
from trtllm_workers.config.spelling import nearest
from trtllm_workers.config.tables import table
from trtllm_workers.config.values import coerce, form, listed, parse, problem, shown
from trtllm_workers.config.yaml_source import (
    YamlItem,
    YamlMapping,
    YamlValue,
    YamlWord,
    display_path,
    load_yaml,
)
from trtllm_workers.errors import ConfigError

_ENVIRONMENT = "environment "

# How TensorRT-LLM works, not what it answers or how much it takes: the other engines rehearse a config
# that holds these keys as if they were not there.
_HOW_TRTLLM_WORKS = (
    "attention_dp_config",
    "cache_transceiver_config",
    "cuda_graph_config",
    "disable_overlap_scheduler",
    "enable_attention_dp",
    "enable_autotuner",
    "enable_iter_perf_stats",
    "guided_decoding_backend",
    "kv_cache_config.dtype",
    "kv_cache_config.enable_partial_reuse",
    "kv_cache_config.event_buffer_max_size",
    "kv_cache_config.free_gpu_memory_fraction",
    "kv_cache_config.host_cache_size",
    "moe_config",
    "moe_expert_parallel_size",
    "moe_tensor_parallel_size",
    "pipeline_parallel_size",
    "print_iter_log",
    "speculative_config",
    "stream_interval",
    "tensor_parallel_size",
)


@dataclass(frozen=True, slots=True)
class Override:
    """A key set outside the YAML file. ``value`` is text as typed, or already typed.

    ``source`` is a flag ("--max-batch-size", "--set") or "environment NAME"; a flag beats the
    environment, and of two of one kind the later wins.
    """

    key: str
    value: Any
    source: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"

    @property
    def from_environment(self) -> bool:
        return self.source.startswith(_ENVIRONMENT)


def parse_override(text: str, source: str) -> Override:
    """Return the override of ``KEY=VALUE``. Raises ConfigError for another form."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"{source}: must be KEY=VALUE, for example kv_cache_config.max_tokens=4096, "
            f"not {shown(text)}",
            param=source,
        )
    return Override(key.strip(), value.strip(), source)


def load_engine_config(
    engine: str,
    keys: Mapping[str, Key],
    path: Path | None,
    overrides: Sequence[Override] = (),
) -> EngineConfig:
    """Return the settings of ``engine``; every key of ``keys`` is present, with its source.

    Raises ConfigError with all problems, one per line: unknown keys (with the nearest name), keys
    TensorRT-LLM knows but this engine does not honour, wrong types, values out of range.
    """
    check = _Check(engine, keys, trtllm_schema())
    if path is not None:
        check.file(load_yaml(path), display_path(path))
    for override in sorted(overrides, key=lambda override: not override.from_environment):
        check.override(override)
    check.raise_problems()
    settings = {key: Setting(spec.default, "default") for key, spec in keys.items()}
    return EngineConfig(engine, settings | check.settings, tuple(check.without_effect))


def show_config(config: EngineConfig) -> str:
    """Return the settings as a table: key, value, source; keys in alphabetical order."""
    rows = [
        (key, shown_value(setting.value), setting.source)
        for key, setting in sorted(config.settings.items())
    ]
    return table(("key", "value", "source"), rows)


def shown_value(value: Any) -> str:
    """Return a value as it would stand in the YAML file."""
    return value if isinstance(value, str) else shown(value)


class _Check:
    """Settings and problems being collected from every layer."""

    def __init__(self, engine: str, keys: Mapping[str, Key], schema: Schema) -> None:
        self.settings: dict[str, Setting] = {}
        self.without_effect: list[str] = []
        self._engine = engine
        self._keys = keys
        self._schema = schema
        self._problems: list[str] = []
        self._first: str | None = None
        self._dishonoured = False

    def file(self, mapping: YamlMapping, name: str) -> None:
        self._section(mapping, "", name)

    def override(self, override: Override) -> None:
        where = f"{override.source} {override.key}"
        if override.key in self._keys:
            self._set(override.key, override.value, where, override.source, is_text=True)
        elif self._schema.knows(override.key) and self._is_without_effect(override.key):
            self.without_effect.append(f"{override.key} ({override.source})")
        else:
            self._refuse(override.key, override.source)

    def raise_problems(self) -> None:
        if not self._problems:
            return
        lines = list(self._problems)
        if self._dishonoured:
            lines.append(f"{self._engine} honours: {', '.join(sorted(self._keys))}")
        raise ConfigError("\n".join(lines), param=self._first)

    def _section(self, mapping: YamlMapping, prefix: str, name: str) -> None:
        for item in mapping.items:
            key, where = prefix + item.key, f"{name}:{item.line}"
            is_own_section = self._is_own_section(key)
            if "." in item.key:
                self._refuse(key, where, is_flat=True)
            elif self._schema.knows(key) and self._is_without_effect(key):
                if key in _HOW_TRTLLM_WORKS:
                    self.without_effect.append(f"{key} ({where})")
                if isinstance(item.value, YamlMapping):
                    self._section(item.value, f"{key}.", name)
            elif key in self._keys:
                self._leaf(key, item.value, where)
            elif isinstance(item.value, YamlMapping) and (
                is_own_section or (item.value.items and self._is_section(key))
            ):
                self._section(item.value, f"{key}.", name)
            elif is_own_section:
                self._fail(key, f"{where}: {self._section_advice(key, item)}")
            else:
                self._refuse(key, where)

    def _leaf(self, key: str, value: YamlValue, where: str) -> None:
        if isinstance(value, YamlMapping | tuple):
            shape = "a list" if isinstance(value, tuple) else "a section of keys"
            self._fail(key, f"{where}: '{key}' must be {self._form(key)}, not {shape}")
        else:
            self._set(key, value, f"{where}: '{key}'", where, is_text=False)

    def _set(self, key: str, given: Any, where: str, source: str, *, is_text: bool) -> None:
        spec = self._keys[key]
        colon = ":" if is_text else ""
        try:
            value = _typed(spec, given, is_text=is_text)
        except ValueError:
            said = given.text if isinstance(given, YamlWord) else shown(given)
            advice = _advice(spec, given, is_text=is_text)
            self._fail(key, f"{where}{colon} must be {self._form(key)}, not {said}{advice}")
            return
        wrong = None
        if value is not None:
            wrong = problem(value, minimum=spec.minimum, maximum=spec.maximum, choices=spec.choices)
        if wrong:
            self._fail(key, f"{where}{colon} {wrong}")
        else:
            self.settings[key] = Setting(value, source)

    def _refuse(self, key: str, where: str, *, is_flat: bool = False) -> None:
        if self._schema.knows(key) and not is_flat:
            self._dishonoured = True
            self._fail(
                key,
                f"{where}: engine '{self._engine}' does not honour '{key}' (a TensorRT-LLM key); "
                "remove it or use an engine that honours it",
            )
            return
        text = f"{where}: unknown key '{key}'"
        if is_flat and self._schema.knows(key):
            section, _, last = key.rpartition(".")
            text += f"\n  write '{last}:' indented under '{section}:'"
        elif key in self._schema.renamed:
            text += f"\n  a key of older TensorRT-LLM releases; {self._schema.renamed[key]}"
        elif near := self._nearest(key):
            text += f"\n  did you mean '{near[0]}'?"
            if near[1] not in self._all_own():
                text += f" (engine '{self._engine}' does not honour it either)"
        self._fail(key, text)

    def _nearest(self, key: str) -> tuple[str, str] | None:
        """Return (what to write, dotted key): the likeliest in the section, or of that name anywhere."""
        section, _, last = key.rpartition(".")
        for known in (self._all_own(), set(self._schema.keys)):
            beside = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == section]
            if near := nearest(last, beside):
                return near, f"{section}.{near}" if section else near
        for known in (set(self._keys), set(self._schema.keys)):
            elsewhere = sorted(one for one in known if one.rpartition(".")[2] == last)
            if elsewhere:
                return elsewhere[0], elsewhere[0]
        whole = nearest(key, self._all_own())
        return (whole, whole) if whole else None

    def _is_without_effect(self, key: str) -> bool:
        return key not in self._keys and any(
            key == one or key.startswith(f"{one}.") for one in _HOW_TRTLLM_WORKS
        )

    def _all_own(self) -> set[str]:
        """Return the honoured keys and the sections they stand in."""
        own = set(self._keys)
        for key in self._keys:
            parts = key.split(".")
            own.update(".".join(parts[:end]) for end in range(1, len(parts)))
        return own

    def _is_own_section(self, key: str) -> bool:
        return any(own.startswith(f"{key}.") for own in self._keys)

    def _is_section(self, key: str) -> bool:
        return self._is_own_section(key) or any(
            known.startswith(f"{key}.") for known in self._schema.keys
        )

    def _section_advice(self, key: str, item: YamlItem) -> str:
        inside = sorted(
            own.removeprefix(f"{key}.") for own in self._keys if own.startswith(f"{key}.")
        )
        if item.value is None:
            return f"section '{key}' is empty; remove it or indent keys under it"
        return f"'{key}' is a section, not a value; indent keys under it: {', '.join(inside)}"

    def _form(self, key: str) -> str:
        spec = self._keys[key]
        if spec.choices:
            return listed(spec.choices)
        return form(spec.kind) + (" or null" if spec.optional else "")

    def _fail(self, key: str, text: str) -> None:
        self._first = self._first or key
        self._problems.append(text)


def _typed(spec: Key, given: Any, *, is_text: bool) -> Any:
    """Return ``given`` as the key's kind. Raises ValueError when it is none."""
    if given is None or (is_text and spec.optional and given in ("null", "none", "None")):
        if not spec.optional:
            raise ValueError
        return None
    if isinstance(given, YamlWord):
        if spec.kind is bool and given.as_bool is not None:
            return given.as_bool
        raise ValueError
    if is_text and isinstance(given, str):
        return parse(given, spec.kind)
    return coerce(given, spec.kind)


def _advice(spec: Key, given: Any, *, is_text: bool) -> str:
    """Return what to write instead, in brackets, where a small thing is wrong."""
    if isinstance(given, YamlWord):
        return f" ({given.advice})"
    if isinstance(given, str) and not is_text and spec.kind is not str:
        try:
            parse(given, spec.kind)
        except ValueError:
            return ""
        return " (drop the quotes)"
    return ""

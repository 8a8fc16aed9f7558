"""Launcher settings: flag over environment over default, each value with its source. No YAML here.

A caller does::

    settings = resolve(flags, environment(), demo=(demo_model_path(), DEMO_MODEL_NAME))
    for warning in settings.warnings: ...
    keys = engine_keys(settings.engine)
    config = load_engine_config(
        settings.engine, keys, settings.engine_config, settings.overrides
    )
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.config.engine_config import Override, parse_override
from trtllm_workers.config.env import (
    hub_cache_dir,
    read_text,
    state_dir,
    suspicious_variables,
)
from trtllm_workers.config.model_folder import model_folder_problem, served_name
from trtllm_workers.config.options import GROUPS, LAUNCH_OPTIONS, Option
from trtllm_workers.config.shipped import shipped_engine_config
from trtllm_workers.config.tables import table
from trtllm_workers.config.values import coerce, form, parse, problem, shown
from trtllm_workers.errors import ConfigError

__all__ = ["GROUPS", "LAUNCH_OPTIONS", "Option", "Settings", "resolve", "show_settings"]

_SHORTEST_SECRET = 16
_SHIPPED_CONFIG = "agg.yaml"
_AUTO_ENGINE = "torch"


@dataclass(frozen=True, slots=True)
class Settings:
    """All launcher settings; field names are those of ``LAUNCH_OPTIONS``.

    ``engine`` is never ``auto``. None means: ``discovery`` a directory of the run, ``cluster_secret``
    a random one for the run, ``log_dir`` in the run's own folder, ``sim_cost_model`` the engine's
    own. ``sources`` tells where each value came from; ``warnings`` are for the operator's eyes.
    """

    model_path: Path
    served_model_name: str
    engine: str
    engine_config: Path | None
    overrides: tuple[Override, ...]
    sim_cost_model: Path | None
    http_host: str
    http_port: int
    num_workers: int
    start_timeout_s: float
    drain_timeout_s: float
    discovery: str | None
    cluster_secret: str | None = field(repr=False)
    run_dir: Path
    log_dir: Path | None
    log_level: str
    log_format: str
    sources: Mapping[str, str] = field(repr=False)
    warnings: tuple[str, ...] = ()


class _Layers:
    """Values and sources being collected, and every problem met on the way."""

    def __init__(self, explicit: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.problems: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        for option in LAUNCH_OPTIONS:
            self._take(option, explicit.get(option.name), environ)

    def fail(self, name: str, text: str) -> None:
        source = self.sources.get(name, "default")
        self.problems.append((name, text if source == "default" else f"{source}: {text}"))

    def default(self, name: str, value: Any, source: str = "default") -> None:
        """Set what the layers left open."""
        if self.values[name] is None:
            self.values[name], self.sources[name] = value, source

    def _take(self, option: Option, given: Any, environ: Mapping[str, str]) -> None:
        variable = read_text(option.env, environ)
        if given is not None and given != ():
            self.sources[option.name] = option.flag or option.name
            self.values[option.name] = self._typed(option, given)
        elif variable is not None:
            self.sources[option.name] = f"environment {variable[0]}"
            self.values[option.name] = self._typed(option, variable[1])
            self._note_conflict(option, variable, environ)
        else:
            self.sources[option.name] = "default"
            self.values[option.name] = option.default

    def _typed(self, option: Option, given: Any) -> Any:
        if option.multiple:
            return tuple(given)
        if isinstance(given, str) and not given.strip():
            self.fail(option.name, "must not be empty")
            return option.default
        try:
            if isinstance(given, str):
                # Choices are words; nobody means another engine by writing it in capitals.
                text = given.strip().casefold() if option.choices else given
                value = parse(text, option.kind)
            else:
                value = coerce(given, option.kind)
        except ValueError:
            self.fail(
                option.name, f"must be {form(option.kind)}, not {self._quoted(option, given)}"
            )
            return option.default
        wrong = problem(
            value, minimum=option.minimum, maximum=option.maximum, choices=option.choices
        )
        if option.name == "engine" and value == "trtllm":
            wrong = (
                "this version does not ship the adapter for the 'trtllm' engine yet; "
                f"use one of: {', '.join(option.choices)}"
            )
        if wrong:
            self.fail(option.name, wrong)
            return option.default
        return value

    @staticmethod
    def _quoted(option: Option, given: Any) -> str:
        return "what is set" if option.secret else shown(given)

    def _note_conflict(
        self, option: Option, used: tuple[str, str], environ: Mapping[str, str]
    ) -> None:
        for other in option.env:
            text = environ.get(other, "").strip()
            if other != used[0] and text and text != used[1].strip():
                self.warnings.append(f"environment {other} is ignored: {used[0]} is set as well")


def resolve(
    explicit: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    demo: tuple[Path, str] | None = None,
    with_model: bool = True,
) -> Settings:
    """Return the settings of this run: ``explicit`` over ``environ`` over the defaults.

    ``explicit`` holds what was given on the command line by option name, as text or typed; None or
    () means not given. ``demo`` is (folder, served name) of the model to take when none is given.
    ``with_model`` False is for a process without one: ``model_path`` is then not looked at.
    Raises ConfigError naming every wrong flag and variable at once; ``param`` is the first's name.
    """
    unknown = set(explicit) - {option.name for option in LAUNCH_OPTIONS}
    if unknown:
        raise TypeError(f"not in LAUNCH_OPTIONS: {', '.join(sorted(unknown))}")
    layers = _Layers(explicit, environ)
    _settle_engine(layers)
    if with_model:
        _settle_model(layers, environ, demo)
    else:
        layers.default("model_path", Path())
        layers.default("served_model_name", "")
    _settle_planes(layers)
    layers.default("run_dir", state_dir(environ))
    if layers.problems:
        raise ConfigError(
            "\n".join(text for _, text in layers.problems), param=layers.problems[0][0]
        )
    ours = {variable for option in LAUNCH_OPTIONS for variable in option.env}
    warnings = (*layers.warnings, *suspicious_variables(ours, environ))
    return Settings(**layers.values, sources=layers.sources, warnings=warnings)


def _settle_engine(layers: _Layers) -> None:
    values = layers.values
    if values["engine"] == "auto":
        values["engine"] = _AUTO_ENGINE
        layers.sources["engine"] += f" (auto takes {_AUTO_ENGINE})"
    if values["engine_config"] is None:
        layers.default("engine_config", shipped_engine_config(_SHIPPED_CONFIG))
    for name in ("engine_config", "sim_cost_model"):
        wrong = _file_problem(values[name])
        if wrong:
            layers.fail(name, wrong)
    if values["sim_cost_model"] is not None and values["engine"] != "sim":
        source = layers.sources["sim_cost_model"]
        layers.warnings.append(f"{source} has no effect: the engine is {values['engine']}, not sim")
    overrides = []
    for text in values["overrides"]:
        try:
            overrides.append(parse_override(text, "--set"))
        except ConfigError as error:
            layers.problems.append(("overrides", str(error)))
    values["overrides"] = tuple(overrides)


def _file_problem(path: Path | None) -> str | None:
    try:
        if path is None or path.is_file():
            return None
        what = "is a folder, not a YAML file" if path.is_dir() else "does not exist"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    return f"{shown(path)} {what}"


def _settle_model(
    layers: _Layers, environ: Mapping[str, str], demo: tuple[Path, str] | None
) -> None:
    values = layers.values
    if values["model_path"] is None and demo is not None:
        values["model_path"], layers.sources["model_path"] = demo[0], "default (demo model)"
        layers.default("served_model_name", demo[1], "default (demo model)")
    path = values["model_path"]
    if path is None:
        layers.fail("model_path", "no model: give --model-path DIR or set MODEL_PATH")
        return
    wrong = model_folder_problem(path, hub_cache_dir(environ))
    if wrong:
        layers.fail("model_path", wrong)
    layers.default("served_model_name", served_name(path), "last folder of the model path")


def _settle_planes(layers: _Layers) -> None:
    values = layers.values
    host = values["http_host"]
    if "/" in host or host.startswith("[") or host.count(":") == 1:
        layers.fail("http_host", f"must be a host name or an address alone, not {shown(host)}")
    discovery = values["discovery"]
    if discovery is not None and not _is_file_url(discovery):
        layers.fail(
            "discovery",
            f"must be file:///absolute/directory, not {shown(discovery)}; "
            "this version has file discovery only",
        )
    secret = values["cluster_secret"]
    if secret is not None and len(secret) < _SHORTEST_SECRET:
        layers.fail(
            "cluster_secret",
            f"must have {_SHORTEST_SECRET} characters or more; one comes from: openssl rand -hex 32",
        )


def _is_file_url(url: str) -> bool:
    path = url.removeprefix("file://")
    return url.startswith("file://") and path.startswith("/") and path.strip("/") != ""


def show_settings(settings: Settings) -> str:
    """Return the settings as a table: option, value, source. A secret is shown as ``set``."""
    rows = []
    for option in LAUNCH_OPTIONS:
        value = getattr(settings, option.name)
        if option.secret and value is not None:
            text = "set (not shown)"
        elif option.multiple:
            text = " ".join(str(one) for one in value) or "none"
        elif value is None:
            text = option.default_text
        else:
            text = str(value)
        rows.append((option.name, text, settings.sources[option.name]))
    return table(("option", "value", "source"), rows)

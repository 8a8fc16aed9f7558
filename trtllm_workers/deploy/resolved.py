"""What a run was told: every setting with its source, engine configs, versions, commands; no secret.

Stands in the run's folder as ``resolved.json`` from its start, and in its history after its end.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import trtllm_workers
from trtllm_workers import __version__
from trtllm_workers.config.engine_config import Override
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.ask import ask
from trtllm_workers.observe.facts import package_versions
from trtllm_workers.observe.redact import REDACTED, Redactor

if TYPE_CHECKING:
    from trtllm_workers.deploy.plan import Plan

FORMAT = 1
_GIT_TIMEOUT_S = 5.0
_BACKEND = "cache_transceiver_config.backend"


class Sourced(msgspec.Struct, frozen=True):
    """A value as people write it (null: not set), and where it came from."""

    value: Any
    source: str


class EngineSection(msgspec.Struct, frozen=True, kw_only=True):
    """The engine config of one role; ``without_effect`` as in ``EngineConfig``."""

    engine: str
    settings: dict[str, Sourced]
    without_effect: tuple[str, ...] = ()


class ProcessSection(msgspec.Struct, frozen=True, kw_only=True):
    """One process as it was planned; ``environment`` is what it got on top of the launcher's own."""

    name: str
    role: str
    argv: tuple[str, ...]
    environment: dict[str, str]
    unset: tuple[str, ...] = ()
    num_ranks: int = 1


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What ``resolved.json`` holds. ``version`` is that of this software, with its commit if known."""

    format: int
    run_id: str
    host: str
    written_at_s: float
    version: str
    model: str
    settings: dict[str, Sourced]
    engine_configs: dict[str, EngineSection]
    transports: dict[str, str]
    packages: dict[str, str]
    processes: tuple[ProcessSection, ...]
    notes: tuple[str, ...] = ()


def resolved_of(plan: Plan, redactor: Redactor) -> Resolved:
    """Return what ``plan`` resolves to, without secrets. Asks git and package metadata."""
    configs = {
        str(role): EngineSection(
            engine=config.engine,
            settings={
                key: Sourced(
                    redactor.value(key, _plain(setting.value)), redactor.text(setting.source)
                )
                for key, setting in sorted(config.settings.items())
            },
            without_effect=config.without_effect,
        )
        for role, config in plan.engine_configs.items()
    }
    return Resolved(
        format=FORMAT,
        run_id=plan.run_id,
        host=socket.gethostname(),
        written_at_s=time.time(),
        version=version(),
        model=plan.model,
        settings=_settings(plan.settings, redactor) if plan.settings else {},
        engine_configs=configs,
        transports=_transports(plan.settings, configs),
        packages=package_versions(),
        processes=tuple(
            ProcessSection(
                name=one.name,
                role=one.role,
                argv=redactor.words(one.argv),
                environment=redactor.variables(one.env, one.env),
                unset=tuple(sorted(one.unset)),
                num_ranks=one.num_ranks,
            )
            for one in plan.processes
        ),
        notes=tuple(redactor.text(note) for note in plan.notes),
    )


def read_resolved(path: Path) -> Resolved | None:
    """Return what the file holds; None when there is none that this version can read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Resolved)
    except (OSError, msgspec.DecodeError):
        return None


def version() -> str:
    """Return the version of this software; with its commit where it runs from a git checkout."""
    root = Path(trtllm_workers.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return __version__
    said = ask(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"], _GIT_TIMEOUT_S
    )
    return f"{__version__} ({said[0].strip()})" if isinstance(said, tuple) else __version__


def _settings(settings: Settings, redactor: Redactor) -> dict[str, Sourced]:
    found = {}
    for option in LAUNCH_OPTIONS:
        value = _plain(getattr(settings, option.name))
        if option.secret and value is not None:
            value = REDACTED
        source = settings.sources[option.name]
        if option.multiple:
            # "password=…" of --set carries its name inside.
            value = [redactor.text(one) for one in value]
        found[option.name] = Sourced(redactor.value(option.name, value), redactor.text(source))
    return found


def _transports(settings: Settings | None, configs: Mapping[str, EngineSection]) -> dict[str, str]:
    """Return what was asked for; what is in use stands in status files and in ``ended.json``."""
    found = {}
    if settings is not None and settings.disaggregated:
        found["asked"] = settings.kv_transport
        for role, config in configs.items():
            if _BACKEND in config.settings:
                found[f"{role} backend"] = str(config.settings[_BACKEND].value)
    return found


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Override):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Path):
        return f"{value[0]}={value[1]}"  # NAME=DIR
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)

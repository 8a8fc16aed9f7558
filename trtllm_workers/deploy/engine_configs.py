"""Engine configs of a run's roles: read, checked for the engine at hand, and filled up where a role needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtllm_workers.config.engine_config import load_engine_config
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.names import ENGINE_CONFIG_OF
from trtllm_workers.engines.registry import engine_keys
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.engine_config import as_engine_config
from trtllm_workers.lint.formats import one_problem
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.read import read_document
from trtllm_workers.lint.role_keys import role_defaults, role_overrides
from trtllm_workers.lint.rules import check
from trtllm_workers.types import Role


@dataclass(frozen=True, slots=True)
class Loaded:
    """The configs by role; ``notes`` are for the operator's eyes."""

    configs: Mapping[Role, EngineConfig]
    notes: tuple[str, ...] = ()


def load_engine_configs(
    settings: Settings, files: Mapping[Role, Path | None], environ: Mapping[str, str]
) -> Loaded:
    """Return the engine config of every role in ``files``. Raises ConfigError naming every problem at once."""
    if settings.engine == "trtllm":
        return _for_trtllm(settings, files, environ)
    configs: dict[Role, EngineConfig] = {}
    wrong: list[ConfigError] = []
    keys = engine_keys(settings.engine)
    for role, path in files.items():
        try:
            configs[role] = load_engine_config(settings.engine, keys, path, settings.overrides)
        except ConfigError as error:
            wrong.append(error)
    if wrong:
        # One file for both roles, or one --set, is wrong once.
        texts = dict.fromkeys(str(error) for error in wrong)
        raise ConfigError("\n".join(texts), param=wrong[0].param) from wrong[0]
    return Loaded(configs, tuple(_unused(settings, configs)))


def _unused(settings: Settings, configs: Mapping[Role, EngineConfig]) -> list[str]:
    """Say what a file of the operator's holds that this engine has no use for."""
    unused = dict.fromkeys(
        key
        for role, config in configs.items()
        for key in config.without_effect
        if settings.sources[ENGINE_CONFIG_OF[role]] != "default" or "(--set)" in key
    )
    if not unused:
        return []
    return [f"engine {settings.engine} has no use for: {', '.join(unused)}"]


def _for_trtllm(
    settings: Settings, files: Mapping[Role, Path | None], environ: Mapping[str, str]
) -> Loaded:
    documents: list[Document] = []
    problems: list[Problem] = []
    for role, path in files.items():
        overrides = (*settings.overrides, *role_overrides(role, settings))
        document, found = read_document(path, role, overrides=overrides)
        documents.append(document)
        problems += found
    if settings.lint == "on":
        problems += check(documents, _context(settings, environ))
    problems = list(dict.fromkeys(problems))
    errors = [one for one in problems if one.severity is Severity.ERROR]
    if errors:
        hint = "trtllm-launch lint --fix mends what it can" if _can_be_mended(errors) else ""
        lines = [one_problem(one) for one in errors]
        raise ConfigError("\n".join([*lines, *([hint] if hint else [])]), param=errors[0].key)
    warnings = [one_problem(one) for one in problems if one.severity is Severity.WARNING]
    configs = {
        document.role: as_engine_config(document, role_defaults(document.role, settings))
        for document in documents
    }
    return Loaded(configs, tuple(warnings))


def _can_be_mended(problems: Sequence[Problem]) -> bool:
    return any(problem.edits for problem in problems)


def _context(settings: Settings, environ: Mapping[str, str]) -> LintContext:
    return LintContext(
        gpus_per_node=settings.gpus_per_node,
        model_path=settings.model_path,
        model_name=settings.served_model_name,
        kv_transport=settings.kv_transport if settings.disaggregated else None,
        environ=environ,
        sets_role_keys=True,
    )

"""Files in, findings out: every file by itself, then the rules over all of them. Prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtllm_workers.config.engine_config import Override
from trtllm_workers.config.schema import TRTLLM_VERSION
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.read import read_document
from trtllm_workers.lint.rules import check
from trtllm_workers.types import Role


def lint_files(
    files: Sequence[tuple[Role, Path]],
    context: LintContext,
    *,
    version: str = TRTLLM_VERSION,
    overrides: Sequence[Override] = (),
) -> tuple[list[Document], list[Problem]]:
    """Return the documents and all findings, sorted by file and line, each once.

    A file that is no YAML is one finding. The files are taken for one deployment: prefill and decode
    configs among them are compared.
    """
    documents: list[Document] = []
    problems: list[Problem] = []
    for role, path in files:
        try:
            document, found = read_document(path, role, version=version, overrides=overrides)
        except ConfigError as error:
            problems.append(Problem(Severity.ERROR, "unreadable-file", str(error)))
            continue
        documents.append(document)
        problems += found
    problems += without_repeats(problems, check(documents, context))
    return documents, in_order(problems)


def without_repeats(told: Sequence[Problem], more: Sequence[Problem]) -> list[Problem]:
    """Return what is new in ``more``: a key that was found wrong is not told about twice."""
    wrong = {(one.file, one.key) for one in told if one.severity is Severity.ERROR}
    return [one for one in more if (one.file, one.key) not in wrong]


def in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Return the findings sorted by file, line and column, without duplicates."""
    return sorted(
        dict.fromkeys(problems), key=lambda one: (one.file, one.line, one.column, one.rule)
    )

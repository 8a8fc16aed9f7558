"""Findings as text for people, JSON for machines, annotations for GitHub. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from trtllm_workers.lint.problem import Problem, Severity

_GITHUB = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "notice"}


def one_problem(problem: Problem) -> str:
    """Return one finding as text: a line, and what belongs to it indented below."""
    place = ""
    if problem.file:
        place = f"{problem.file}:{problem.line}: " if problem.line else f"{problem.file}: "
    lines = [f"{place}{problem.severity}[{problem.rule}]: {problem.message}"]
    lines += [f"  {line}" for line in problem.arithmetic]
    if problem.advice:
        lines.append(f"  → {problem.advice}")
    return "\n".join(lines)


def as_text(problems: Sequence[Problem], num_files: int) -> str:
    """Return all findings and a line that counts them."""
    return "\n".join([*(one_problem(one) for one in problems), summary(problems, num_files)])


def summary(problems: Sequence[Problem], num_files: int) -> str:
    """Return the line that counts."""
    counts = Counter(one.severity for one in problems)
    files = f"{num_files} file{'' if num_files == 1 else 's'}"
    if not counts:
        return f"{files}: nothing wrong"
    said = [
        f"{counts[severity]} {severity}{'' if counts[severity] == 1 else 's'}"
        for severity in Severity
        if counts[severity]
    ]
    return f"{files}: {', '.join(said)}"


def as_json(problems: Sequence[Problem]) -> str:
    """Return a JSON array with an object per finding; the keys are ``Problem``'s but ``edits``."""
    found = []
    for problem in problems:
        fields = asdict(problem)
        fields["fixable"] = bool(fields.pop("edits"))
        found.append(fields)
    return json.dumps(found, indent=2)


def as_github(problems: Sequence[Problem]) -> str:
    """Return workflow commands, one line each."""
    return "\n".join(_annotation(one) for one in problems)


def exit_code(problems: Sequence[Problem], *, strict: bool) -> int:
    """Return 2 for errors, 1 for warnings (2 when ``strict``), else 0."""
    severities = {one.severity for one in problems}
    if Severity.ERROR in severities:
        return 2
    if Severity.WARNING in severities:
        return 2 if strict else 1
    return 0


def _annotation(problem: Problem) -> str:
    text = "\n".join(filter(None, (problem.message, *problem.arithmetic, problem.advice)))
    where = [f"title={_property(problem.rule)}"]
    if problem.file:
        where.insert(0, f"file={_property(problem.file)}")
    if problem.line:
        where.insert(1, f"line={problem.line},col={problem.column}")
    return f"::{_GITHUB[problem.severity]} {','.join(where)}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

"""What the linter finds, as values. Finds nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is.

    ERROR: it cannot work, or gives wrong results. WARNING: it works, but badly or only with luck.
    NOTE: worth knowing.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Edit:
    """Replaces lines ``first`` to ``last`` of a file (from 1, inclusive) by ``lines``.

    ``last`` = ``first`` - 1 inserts before line ``first``. Lines are without their line ends.
    """

    first: int
    last: int
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding.

    ``rule`` is a stable kebab-case name. ``file`` is as messages show it, "" when no single file is at
    fault; ``line`` and ``column`` count from 1, 0: not in the file. ``key`` is dotted. ``advice`` says
    what to do, ``arithmetic`` how numbers came about, a line each. ``edits`` mend it in that file.
    """

    severity: Severity
    rule: str
    message: str
    file: str = ""
    line: int = 0
    column: int = 0
    key: str = ""
    advice: str = ""
    arithmetic: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()

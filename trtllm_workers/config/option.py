"""What one launcher option is: name, flag, variables, default, bounds, help. Lists none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Option:
    """One launcher option.

    * ``flag`` None: there is none (a secret on a command line would show in ``ps``).
    * ``env``: the variables that set it, first wins. An empty variable counts as unset.
    * ``default`` None with ``default_text``: computed when settings are resolved; the text says how.
    * ``kind`` is str, int, float, bool or Path. ``minimum`` and ``maximum`` are inclusive.
    * ``multiple``: the flag may be repeated; the value is a tuple.
    * ``metavar`` stands for the value in help and messages; empty: derived from ``kind``.
    """

    name: str
    flag: str | None
    env: tuple[str, ...]
    default: Any
    kind: type
    help: str
    group: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False
    multiple: bool = False
    default_text: str = ""
    metavar: str = ""

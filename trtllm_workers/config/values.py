"""Text to typed values, and the checks every value passes. Knows no file, flag or variable."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_workers.config.spelling import nearest

_BOOLS = {"true": True, "1": True, "yes": True, "on": True}
_BOOLS |= {"false": False, "0": False, "no": False, "off": False}
# Digits with optional exponent, as people write them; no hex, no underscores, no "nan".
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")

_FORMS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
_LONGEST_SHOWN = 60
_LONGEST_PATH = 400
# What tensors, JSON readers and C code take; a larger number is a slip of the finger.
_LARGEST_INT = 2**63 - 1


def form(kind: type) -> str:
    """Return what a value of ``kind`` looks like, for messages."""
    return _FORMS[kind]


def shown(value: Any) -> str:
    """Return a value as messages show it: quoted text, lower-case booleans, at most one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | Path):
        longest = _LONGEST_SHOWN if isinstance(value, str) else _LONGEST_PATH
        return f"'{_cut(_escaped(str(value)), longest)}'"
    return _cut(str(value), _LONGEST_SHOWN)


def _escaped(text: str) -> str:
    """Return ``text`` with control characters as escapes: it is one line and forges nothing."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode()
        for char in text
    )


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + "…"


def parse(text: str, kind: type) -> Any:
    """Return ``text`` as ``kind``. Raises ValueError (without a message) when it is none."""
    stripped = text.strip()
    if kind is bool:
        if stripped.casefold() not in _BOOLS:
            raise ValueError
        return _BOOLS[stripped.casefold()]
    if kind is int:
        if not _INT.fullmatch(stripped) or len(stripped) > 30:
            raise ValueError
        return int(stripped)
    if kind is float:
        if not _FLOAT.fullmatch(stripped) or not math.isfinite(float(stripped)):
            raise ValueError
        return float(stripped)
    return Path(text).expanduser() if kind is Path else text


def coerce(value: Any, kind: type) -> Any:
    """Return a typed value as ``kind``: an int is accepted for a float, and nothing else changes.

    Raises ValueError (without a message) for another type; a bool is no number, NaN no value.
    """
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError from None
    if kind is Path and type(value) is str:
        return Path(value).expanduser()
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def listed(choices: Sequence[Any]) -> str:
    """Return choices as the end of "must be": the only one, or ``one of a, b``."""
    words = [choice if isinstance(choice, str) else shown(choice) for choice in choices]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def problem(
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] = (),
) -> str | None:
    """Return what is wrong with a value of the right type, as the end of a sentence, or None."""
    if choices and value not in choices:
        near = nearest(str(value), [choice for choice in choices if isinstance(choice, str)])
        hint = f" (did you mean '{near}'?)" if near else ""
        return f"must be {listed(choices)}, not {shown(value)}{hint}"
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return f"is too large: {shown(value)}"
    below = minimum is not None and value < minimum
    above = maximum is not None and value > maximum
    if not below and not above:
        return None
    if minimum is None:
        bounds = f"{_plain(maximum)} or less"
    elif maximum is None:
        bounds = f"{_plain(minimum)} or more"
    else:
        bounds = f"{_plain(minimum)} to {_plain(maximum)}"
    return f"must be {bounds}, not {shown(value)}"


def _plain(bound: float | None) -> str:
    """Write 65535.0 as 65535, and never 1e+06."""
    return str(int(bound)) if bound is not None and bound == int(bound) else str(bound)

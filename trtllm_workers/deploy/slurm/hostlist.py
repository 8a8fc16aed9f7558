"""SLURM's short form of many host names, ``sn[1-4,07],login``: written out, and made. Pure.

Read is a little more than SLURM reads: it knows no suffix behind a bracket (``sn[1-2]-ib``). Written is
only what SLURM reads too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Final, NoReturn

from trtllm_workers.errors import ConfigError

# Names beyond that are a slip of the pen, and would fill the memory. SLURM itself ends there.
MAX_NAMES: Final = 65_536
_PART: Final = re.compile(r"[A-Za-z0-9._-]+")
_RANGE: Final = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?")
_NUMBERED: Final = re.compile(r"(.*?[^\d])(\d{1,18})")


def expand(text: str) -> list[str]:
    """Return the names that a hostlist stands for, in its order, repeated ones repeated.

    Empty text stands for no host. Raises ConfigError, which shows the place, for anything that is no
    hostlist: a line of an error message that was taken for one, for instance.
    """
    names: list[str] = []
    at = 0
    while at < len(text):
        parts, at = _entry(text, at)
        many = 1
        for part in parts:
            many *= len(part)
        if len(names) + many > MAX_NAMES:
            _refuse(text, at, f"it stands for more than {MAX_NAMES} names")
        names += ["".join(pieces) for pieces in itertools.product(*parts)]
        if at < len(text):  # a comma
            at += 1
            if at == len(text):
                _refuse(text, at, "a name is missing after the last comma")
    return names


def compress(names: Sequence[str]) -> str:
    """Return a hostlist for ``names``, which ``expand`` turns into the same names in the same order.

    Numbers are drawn together only between neighbours, as SLURM does: the order of hosts is the order
    of ranks. Raises ConfigError for what is no host name.
    """
    for name in names:
        if not _PART.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no host name: letters, digits, '.', '_' and '-' make one"
            )
    return ",".join(_compressed(names))


def _compressed(names: Sequence[str]) -> Iterator[str]:
    pairs = map(_split, names)
    for (prefix, is_numbered), group in itertools.groupby(
        pairs, key=lambda pair: (pair[0], pair[1] != "")
    ):
        digits = [number for _, number in group]
        if not is_numbered:
            yield from [prefix] * len(digits)
        elif len(digits) == 1:
            yield prefix + digits[0]
        else:
            yield f"{prefix}[{','.join(_ranges(digits))}]"


def _split(name: str) -> tuple[str, str]:
    """Return a name's front and its number; a name of digits alone is not taken apart."""
    found = _NUMBERED.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def _ranges(digits: Sequence[str]) -> Iterator[str]:
    first = last = digits[0]
    for number in (*digits[1:], ""):
        # A range has the width of its first number: 08-11 and 8-11 are both fine, 8-09 is not.
        if number == str(int(last) + 1).zfill(len(first)):
            last = number
            continue
        yield first if first == last else f"{first}-{last}"
        first = last = number


def _entry(text: str, at: int) -> tuple[list[list[str]], int]:
    """Return the choices of each piece of one entry, and where it ends: at a comma or the end."""
    parts: list[list[str]] = []
    start = at
    while at < len(text) and text[at] != ",":
        if text[at] == "[":
            numbers, at = _bracket(text, at)
            parts.append(numbers)
        elif found := _PART.match(text, at):
            parts.append([found[0]])
            at = found.end()
        elif text[at] == "]":
            _refuse(text, at, "']' without a '['")
        else:
            _refuse(text, at, f"{text[at]!r} is not allowed in a host name")
    if at == start:
        _refuse(text, at, "a name is missing before the comma")
    return parts, at


def _bracket(text: str, at: int) -> tuple[list[str], int]:
    """Return the numbers of the bracket that opens at ``at``, and where it is over."""
    opened = at
    numbers: list[str] = []
    while True:
        at += 1  # over the '[' or the ','
        found = _RANGE.match(text, at)
        if not found:
            _refuse(text, at, f"a number is missing in the '[' of column {opened + 1}")
        first, last = found[1], found[2] or found[1]
        if int(last) < int(first):
            _refuse(text, at, f"the range {found[0]} goes down")
        if int(last) - int(first) + len(numbers) >= MAX_NAMES:
            _refuse(text, at, f"it stands for more than {MAX_NAMES} names")
        width = len(first)
        numbers += [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
        at = found.end()
        if text[at : at + 1] == "]":
            return numbers, at + 1
        if at == len(text):
            _refuse(text, at, f"the '[' of column {opened + 1} is not closed")
        if text[at] != ",":
            _refuse(text, at, f"{text[at]!r} is not allowed in the '[' of column {opened + 1}")


def _refuse(text: str, at: int, why: str) -> NoReturn:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    raise ConfigError(f"no list of hosts: {shown!r}, column {at + 1}: {why}")

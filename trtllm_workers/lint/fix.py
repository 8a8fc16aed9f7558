"""Mends an engine YAML line by line: comments, order and everything that is right stay as they are.

Each step works on lines; in the end the text is read again and must mean what ``migrate.py`` says. A file that
cannot be mended that way (old keys in one-line ``{…}`` sections) is left alone, and so says the message.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtllm_workers.config.schema import TRTLLM_VERSION
from trtllm_workers.config.yaml_source import YamlItem, YamlMapping, YamlWord, parse_yaml
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.migrate import (
    FLATTENED,
    GRAPHS,
    MOVED,
    OVERLAP,
    OVERLAP_NOW,
    USE_GRAPHS,
    USE_GRAPHS_INSIDE,
    migrated,
    old_keys,
)
from trtllm_workers.lint.problem import Severity
from trtllm_workers.lint.read import read_document
from trtllm_workers.lint.types_of_keys import plain
from trtllm_workers.types import Role

_MOST_STEPS = 200


def fix_file(path: Path, *, version: str = TRTLLM_VERSION) -> list[str]:
    """Mend a file in place; return what was changed, in words. Raises ConfigError, and then nothing is written."""
    try:
        before = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    ending = "\r\n" if "\r\n" in before else "\n"
    text, changes = fix_text(before.replace("\r\n", "\n"), str(path))
    text, spelled = _spelling(text, path, version)
    changes += spelled
    if changes:
        _write(path, text.replace("\n", ending))
    return changes


def fix_text(text: str, name: str) -> tuple[str, list[str]]:
    """Return a text with its old keys where they belong now, and what was changed. Raises ConfigError."""
    wanted = migrated(_meaning(text, name))
    lines = text.split("\n")
    changes: list[str] = []
    for _ in range(_MOST_STEPS):
        mapping = parse_yaml("\n".join(lines), name)
        old = old_keys(_plain_values(mapping))
        if not old:
            break
        changes.append(_step(lines, mapping, old[0], name))
        with suppress(ConfigError):
            parse_yaml("\n".join(lines), name)
            continue
        raise _unmendable(name)  # a text that nobody wrote is no matter for a message
    new = "\n".join(lines)
    if _meaning(new, name) != wanted:
        raise _unmendable(name)
    return new, changes


def _unmendable(name: str) -> ConfigError:
    return ConfigError(
        f"{name}: its old keys cannot be mended line by line; nothing was written. "
        "Write sections over several lines instead of {…}, then try again"
    )


def _step(lines: list[str], mapping: YamlMapping, old: str, name: str) -> str:
    """Move or rename one old key in ``lines``."""
    section, _, key = old.rpartition(".")
    item = _find(mapping, old)
    at, end = item.line - 1, _end_of(lines, item)
    if not lines[at][item.column - 1 :].startswith(key):
        raise ConfigError(
            f"{name}:{item.line}: '{old}' stands in quotes or within {{…}}; write it on a line of its own"
        )
    if section and lines[at][: item.column - 1].strip():
        raise ConfigError(
            f"{name}:{item.line}: '{old}' stands within {{…}}; write it on a line of its own"
        )
    if old == FLATTENED:
        if isinstance(item.value, YamlMapping) and item.value.items:
            inside = _dedented(lines[at + 1 : end])
            taken = {one.key for one in mapping.items}
            doubled = [one.key for one in item.value.items if one.key in taken]
            if doubled:
                raise ConfigError(
                    f"{name}:{item.line}: '{doubled[0]}' stands both in {old} and at the top"
                )
            lines[at:end] = inside
        else:
            del lines[at:end]
        return f"the keys of {FLATTENED} now stand at the top level"
    if old == OVERLAP:
        value = not _truth(item)
        lines[at] = _with(lines[at], item, OVERLAP_NOW, "true" if value else "false")
        return f"{OVERLAP} is now {OVERLAP_NOW}: {'true' if value else 'false'}"
    if old == USE_GRAPHS:
        return _graphs_switch(lines, mapping, item, at, end)
    if old == USE_GRAPHS_INSIDE:
        return _inner_graphs_switch(lines, mapping, item, at, end)
    home, _, new_key = MOVED[old].rpartition(".")
    target = next((one for one in mapping.items if one.key == home), None)
    there = isinstance(target.value, YamlMapping) if target is not None else False
    if there and target is not None and any(one.key == new_key for one in target.value.items):  # type: ignore[union-attr]
        del lines[at:end]
        return f"{old} is gone: {MOVED[old]} is set"
    if section == home:
        lines[at] = lines[at].replace(key, new_key, 1)
        return f"{old} is now {MOVED[old]}"
    block = lines[at:end]
    block[0] = block[0].replace(key, new_key, 1)
    indented = [f"  {line}" if line.strip() else line for line in block]
    del lines[at:end]
    if target is None:
        lines[at:at] = [f"{home}:", *indented]
    else:
        _insert_into(lines, target, indented, removed_before=end - at if at < target.line else 0)
    return f"{old} is now {MOVED[old]}"


def _graphs_switch(
    lines: list[str], mapping: YamlMapping, item: YamlItem, at: int, end: int
) -> str:
    if _truth(item):
        del lines[at:end]
        return f"{USE_GRAPHS} is gone: graphs are on unless {GRAPHS} is null"
    others = [
        one for one in mapping.items if one.key == GRAPHS or one.key.startswith("cuda_graph_")
    ]
    lines[at] = _with(lines[at], item, GRAPHS, "null")
    for other in sorted(
        others, key=lambda one: -one.line
    ):  # from below, so that lines keep their places
        del lines[other.line - 1 : _end_of(lines, other)]
    return f"{USE_GRAPHS}: false is now {GRAPHS}: null"


def _inner_graphs_switch(
    lines: list[str], mapping: YamlMapping, item: YamlItem, at: int, end: int
) -> str:
    section = next(one for one in mapping.items if one.key == GRAPHS)
    header = section.line - 1
    if not _truth(item):
        lines[header : _end_of(lines, section)] = [_with(lines[header], section, GRAPHS, "null")]
        return f"{USE_GRAPHS_INSIDE}: false is now {GRAPHS}: null"
    assert isinstance(section.value, YamlMapping), "old_keys looks into mappings only"
    del lines[at:end]
    if len(section.value.items) == 1:  # an empty section would read as null, which is off
        lines[header] = _with(lines[header], section, GRAPHS, "{}")
    return f"{USE_GRAPHS_INSIDE} is gone: graphs are on unless {GRAPHS} is null"


def _insert_into(
    lines: list[str], target: YamlItem, block: list[str], *, removed_before: int
) -> None:
    """Put lines at the end of a section; an empty one becomes a section of keys."""
    header = target.line - 1 - removed_before
    if isinstance(target.value, YamlMapping) and target.value.items:
        first = target.value.items[0]
        indent = " " * (first.column - 1)
        shifted = YamlItem(target.key, target.value, header + 1, target.column)
        end = _end_of(lines, shifted)
        lines[end:end] = [indent + line[2:] if line.strip() else line for line in block]
        return
    lines[header] = lines[header].split(":", 1)[0] + ":"
    lines[header + 1 : header + 1] = block


def _end_of(lines: list[str], item: YamlItem) -> int:
    """Return the index behind the last line of a key's value; comments that follow it do not belong to it."""
    indent = item.column - 1
    end = item.line
    for index in range(item.line, len(lines)):
        line = lines[index]
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        own = len(line) - len(line.lstrip())
        # A list may stand at the indentation of its key.
        if own > indent or (own == indent and stripped.startswith("- ")):
            end = index + 1
            continue
        break
    return end


def _dedented(block: list[str]) -> list[str]:
    indents = [len(line) - len(line.lstrip()) for line in block if line.strip()]
    cut = min(indents, default=0)
    return [line[cut:] if line.strip() else line for line in block]


def _with(line: str, item: YamlItem, key: str, value: str) -> str:
    """Return a line with another key and value; its comment stays."""
    comment = ""
    head = line[: item.column - 1]
    if " #" in line:
        comment = "  " + line[line.index(" #") :].strip()
    return f"{head}{key}: {value}{comment}"


def _truth(item: YamlItem) -> bool:
    value = item.value
    if isinstance(value, YamlWord) and value.as_bool is not None:
        return value.as_bool
    if not isinstance(value, bool):
        raise ConfigError(f"'{item.key}' must be true or false, not {value}")
    return value


def _find(mapping: YamlMapping, dotted: str) -> YamlItem:
    section, _, key = dotted.rpartition(".")
    inner = mapping
    if section:
        value = next(one.value for one in mapping.items if one.key == section)
        assert isinstance(value, YamlMapping), "old_keys looks into mappings only"
        inner = value
    return next(one for one in inner.items if one.key == key)


def _plain_values(mapping: YamlMapping) -> dict[str, Any]:
    found: dict[str, Any] = _booleans(plain(mapping), mapping)
    return found


def _booleans(values: dict[str, Any], mapping: YamlMapping) -> dict[str, Any]:
    """Read yes and off as the booleans that YAML 1.1 makes of them."""
    for item in mapping.items:
        if isinstance(item.value, YamlWord) and item.value.as_bool is not None:
            values[item.key] = item.value.as_bool
        elif isinstance(item.value, YamlMapping):
            values[item.key] = _booleans(values[item.key], item.value)
    return values


def _meaning(text: str, name: str) -> dict[str, Any]:
    return _plain_values(parse_yaml(text, name))


def _spelling(text: str, path: Path, version: str) -> tuple[str, list[str]]:
    """Return a text with its unmistakable typing mistakes mended."""
    changes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        _document, problems = read_document(copy, Role.AGGREGATED, version=version)
    lines = text.split("\n")
    for problem in problems:
        if problem.severity is Severity.ERROR and problem.edits:
            for edit in problem.edits:
                if lines[edit.first - 1 : edit.last] != list(edit.lines):
                    lines[edit.first - 1 : edit.last] = edit.lines
            changes.append(f"line {problem.line}: {problem.message}: mended")
    new = "\n".join(lines)
    parse_yaml(new, str(path))
    return new, changes


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole; a reader sees the old one or the new one. Its mode stays."""
    target = path.resolve()
    mode = target.stat().st_mode
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(name, mode)
        os.replace(name, target)
    except OSError as error:
        with suppress(OSError):
            os.unlink(name)
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

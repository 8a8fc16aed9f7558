"""A YAML file as values with positions. Knows the language, not one key of ours.

Reads what every YAML reader agrees on, and says so where they do not: PyYAML (which TensorRT-LLM
uses) follows YAML 1.1, where ``yes`` is true, ``010`` is eight and ``8e-1`` is text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from trtllm_workers.config.values import shown
from trtllm_workers.errors import ConfigError

# A config is a page of text; a larger file is the wrong file.
_LARGEST_BYTES = 256 * 1024
_MOST_VALUES = 10_000

_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE = {"true", "True", "TRUE"}
_FALSE = {"false", "False", "FALSE"}
_OLD_TRUE = {"yes", "Yes", "YES", "on", "On", "ON"}
_OLD_FALSE = {"no", "No", "NO", "off", "Off", "OFF"}
_INT = re.compile(r"[+-]?(0|[1-9][0-9_]*)")
_OCTAL = re.compile(r"[+-]?0[0-7_]+")
_FLOAT = re.compile(r"[+-]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class YamlWord:
    """A plain word that YAML readers take differently (``yes``, ``off``, ``010``).

    ``as_bool`` is its YAML 1.1 value where that is a boolean; ``advice`` says what to write.
    """

    text: str
    as_bool: bool | None
    advice: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class YamlMapping:
    """A section: its keys in file order."""

    items: tuple[YamlItem, ...]


YamlScalar = str | int | float | bool | None | YamlWord
YamlValue = YamlScalar | YamlMapping | tuple["YamlValue", ...]


@dataclass(frozen=True, slots=True)
class YamlItem:
    """One key with its value and where the key stands; line and column count from 1."""

    key: str
    value: YamlValue
    line: int
    column: int


class _NodeLoader(yaml.SafeLoader):
    """Composes nodes and resolves no scalar: ``_scalar`` below does."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as PyYAML declares it


def display_path(path: Path) -> str:
    """Return ``path`` as messages show it: relative to the working directory when that is shorter."""
    absolute = os.path.abspath(path)
    try:
        relative = os.path.relpath(absolute)
    except (OSError, ValueError):  # the working directory is gone, or on another drive
        return absolute
    return relative if len(relative) < len(absolute) else absolute


def load_yaml(path: Path) -> YamlMapping:
    """Return the top-level mapping of a YAML file; an empty file has no keys.

    Raises ConfigError with file, line and column for what cannot be read: no file, broken syntax,
    a key given twice, tags, several documents, anything but a mapping at the top.
    """
    return parse_yaml(_read(path), display_path(path))


def parse_yaml(text: str, name: str) -> YamlMapping:
    """Return the top-level mapping of YAML text; ``name`` stands for the file in messages."""
    try:
        root = yaml.compose(text, Loader=_NodeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_message(error, name)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{name}:{line}: the character U+{ord(text[error.position]):04X} is not allowed in YAML"
        ) from error
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value in _NULL):
        return YamlMapping(())
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{_at(root, name)}: the file must hold 'key: value' lines at the top")
    return _Reader(name).mapping(root)


class _Reader:
    """Turns nodes into values; counts them, so that aliases cannot blow a small file up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: set[int] = set()
        self._count = 0

    def mapping(self, node: yaml.MappingNode) -> YamlMapping:
        self._enter(node)
        own: dict[str, YamlItem] = {}
        merged: dict[str, YamlItem] = {}
        for key_node, value_node in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value == "<<":
                for item in self._merge(value_node):
                    merged.setdefault(item.key, item)
                continue
            key = self._key(key_node)
            line, column = _position(key_node)
            if key in own:
                raise ConfigError(
                    f"{_at(key_node, self._name)}: key '{key}' is given twice, "
                    f"first in line {own[key].line}"
                )
            own[key] = YamlItem(key, self._value(value_node), line, column)
        self._open.discard(id(node))
        rest = (item for key, item in merged.items() if key not in own)
        return YamlMapping((*own.values(), *rest))

    def _value(self, node: yaml.Node) -> YamlValue:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node)
        if isinstance(node, yaml.SequenceNode):
            self._enter(node)
            values = tuple(self._value(child) for child in node.value)
            self._open.discard(id(node))
            return values
        self._enter(node)
        self._open.discard(id(node))
        assert isinstance(node, yaml.ScalarNode)
        return node.value if node.style is not None else plain_scalar(node.value)

    def _merge(self, node: yaml.Node) -> Iterator[YamlItem]:
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in sources:
            if not isinstance(source, yaml.MappingNode):
                raise ConfigError(f"{_at(source, self._name)}: '<<' needs a section to merge")
            yield from self.mapping(source).items

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"{_at(node, self._name)}: a key must be a word")
        # Whole numbers are keys of mappings such as draft_len_schedule.
        plain = plain_scalar(node.value) if node.style is None else node.value
        if isinstance(plain, bool) or not isinstance(plain, str | int):
            raise ConfigError(f"{_at(node, self._name)}: a key must be a word, not {node.value}")
        return str(node.value)

    def _enter(self, node: yaml.Node) -> None:
        self._count += 1
        if self._count > _MOST_VALUES:
            raise ConfigError(f"{self._name}: more than {_MOST_VALUES} values (aliases counted)")
        if id(node) in self._open:
            raise ConfigError(f"{_at(node, self._name)}: an alias contains itself")
        if not node.tag.startswith("tag:yaml.org,2002:") or _has_explicit_type(node):
            raise ConfigError(
                f"{_at(node, self._name)}: the tag {_tag(node)} is not supported; "
                "write the value without it"
            )
        self._open.add(id(node))


def plain_scalar(text: str) -> YamlScalar:
    """Return the value of an unquoted scalar."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if text in _OLD_TRUE or text in _OLD_FALSE:
        value = text in _OLD_TRUE
        return YamlWord(
            text, value, f"YAML 1.1 reads {text} as {shown(value)}; for text write '{text}'"
        )
    if _OCTAL.fullmatch(text):
        octal = int(text.replace("_", ""), 8)
        return YamlWord(
            text, None, f"YAML 1.1 reads {text} as octal {octal}; drop the leading zero"
        )
    if len(text) <= 300:  # longer digits are no number anybody means, and slow to convert
        if _INT.fullmatch(text):
            return int(text.replace("_", ""))
        if _FLOAT.fullmatch(text):
            return float(text.replace("_", ""))
    return text


def _read(path: Path) -> str:
    name = display_path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {name}") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(
            f"{name} is larger than {_LARGEST_BYTES // 1024} KiB, more than a config can be"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text") from error


def _syntax_message(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem, context = error.problem or "broken YAML", error.context
    if context is None:
        text = problem
    else:
        text = f"{context}, {problem}" if problem.startswith("but ") else f"{problem} ({context})"
    if "'\\t'" in text:
        text += "; indent with spaces, not tabs"
    return f"{place}: {text}"


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _at(node: yaml.Node, name: str) -> str:
    line, column = _position(node)
    return f"{name}:{line}:{column}"


def _has_explicit_type(node: yaml.Node) -> bool:
    # Without implicit resolvers every untagged node has the tag of its shape.
    return node.tag.rpartition(":")[2] not in ("str", "seq", "map")


def _tag(node: yaml.Node) -> str:
    return str(node.tag).replace("tag:yaml.org,2002:", "!!")

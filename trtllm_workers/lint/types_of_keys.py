"""Values of a YAML against types as TensorRT-LLM writes them: ``Optional[List[int]]``, ``Union[str, Path]``.

As lenient as pydantic is there (an int for a float, digits in quotes for a number), because what it takes
works; what it takes only by its leniency is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from trtllm_workers.config.yaml_source import YamlMapping, YamlValue, YamlWord

_TOKEN = re.compile(r"\s*([A-Za-z_][\w.]*|'[^']*'|[\[\],])")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TEXT = ("str", "Path")


@dataclass(frozen=True, slots=True)
class Type:
    """A type: its name, and what stands in its brackets."""

    name: str
    inner: tuple[Type, ...] = ()


@dataclass(frozen=True, slots=True)
class Converted:
    """A value of the right type; ``lenient`` says how it had to be read."""

    value: Any
    lenient: str = ""


class WrongType(Exception):
    """The value is of another type; the message says what it is."""


@cache
def type_of(text: str) -> Type:
    """Return a type from its text."""
    tokens = _tokens(text)
    found, rest = _parse(list(tokens))
    assert not rest, f"type {text} has something behind it"
    return found


def convert(kind: Type, value: YamlValue) -> Converted:
    """Return ``value`` as ``kind``. Raises WrongType."""
    if kind.name == "Optional":
        return Converted(None) if value is None else convert(kind.inner[0], value)
    if kind.name == "Union":
        return _union(kind, value)
    if kind.name in ("List", "Set"):
        return _list(kind, value)
    if kind.name in ("Dict", "dict"):
        return _dict(kind, value)
    if kind.name == "object":
        return Converted(plain(value))
    if isinstance(value, YamlMapping | tuple) or value is None:
        raise WrongType(_what(value))
    if kind.name == "bool":
        return _bool(value)
    if kind.name in ("int", "float"):
        return _number(kind.name, value)
    if kind.name == "NoneType":
        raise WrongType(_what(value))
    return _str(value)  # text, a path, a Literal or an enum: which words are allowed is a choice


def form_of(kind: Type) -> str:
    """Return what a value of ``kind`` looks like, for messages."""
    if kind.name == "Optional":
        return f"{form_of(kind.inner[0])} or null"
    if kind.name == "Union":
        parts = dict.fromkeys(form_of(one) for one in kind.inner)
        return " or ".join(parts)
    if kind.name in ("List", "Set"):
        return f"a list of {_plural(kind.inner[0])}" if kind.inner else "a list"
    return {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "NoneType": "null",
        "Dict": "a mapping",
        "dict": "a mapping",
        "object": "a mapping",
    }.get(kind.name, "text")


def plain(value: YamlValue) -> Any:
    """Return a YAML value as Python's own: mappings, lists, scalars."""
    if isinstance(value, YamlMapping):
        return {item.key: plain(item.value) for item in value.items}
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return value.text if isinstance(value, YamlWord) else value


def _plural(kind: Type) -> str:
    words = {"int": "whole numbers", "float": "numbers", "str": "words"}
    return words.get(kind.name, "lists" if kind.name == "List" else "values")


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match, f"type {text} cannot be read at {at}"
        yield match[1]
        at = match.end()


def _parse(tokens: list[str]) -> tuple[Type, list[str]]:
    name, rest = tokens[0].strip("'"), tokens[1:]
    inner: list[Type] = []
    if rest and rest[0] == "[":
        rest = rest[1:]
        while rest[0] != "]":
            if rest[0] == ",":
                rest = rest[1:]
            one, rest = _parse(rest)
            inner.append(one)
        rest = rest[1:]
    return Type(name, tuple(inner)), rest


def _union(kind: Type, value: YamlValue) -> Converted:
    if value is None and any(one.name == "NoneType" for one in kind.inner):
        return Converted(None)
    lenient: Converted | None = None
    for one in kind.inner:
        try:
            found = convert(one, value)
        except WrongType:
            continue
        if not found.lenient:
            return found
        lenient = lenient or found
    if lenient is None:
        raise WrongType(_what(value))
    return lenient


def _list(kind: Type, value: YamlValue) -> Converted:
    if not isinstance(value, tuple):
        raise WrongType(_what(value))
    items = []
    lenient = ""
    for index, item in enumerate(value):
        try:
            found = convert(kind.inner[0], item) if kind.inner else Converted(plain(item))
        except WrongType as wrong:
            raise WrongType(f"a list whose item {index + 1} is {wrong}") from None
        items.append(found.value)
        lenient = lenient or found.lenient
    return Converted(items, lenient)


def _dict(kind: Type, value: YamlValue) -> Converted:
    if not isinstance(value, YamlMapping):
        raise WrongType(_what(value))
    found: dict[Any, Any] = {}
    lenient = ""
    for item in value.items:
        key: Any = item.key
        if kind.inner and kind.inner[0].name == "int":
            if not _WHOLE.fullmatch(item.key):
                raise WrongType(f"a mapping with the key '{item.key}', which is no whole number")
            key = int(item.key)
        if kind.inner and kind.inner[1].name == "str":
            found[key] = _as_text(item.value)
            continue
        try:
            one = convert(kind.inner[1], item.value) if kind.inner else Converted(plain(item.value))
        except WrongType as wrong:
            raise WrongType(f"a mapping whose '{item.key}' is {wrong}") from None
        found[key] = one.value
        lenient = lenient or one.lenient
    return Converted(found, lenient)


def _as_text(value: YamlValue) -> str:
    """Return the text that TensorRT-LLM makes of a value itself: what YAML 1.1 reads as true becomes True."""
    if isinstance(value, YamlWord) and value.as_bool is not None:
        return str(value.as_bool)
    return str(plain(value))


def _bool(value: YamlValue) -> Converted:
    if isinstance(value, bool):
        return Converted(value)
    if isinstance(value, YamlWord) and value.as_bool is not None:
        return Converted(value.as_bool)
    if value in (0, 1) and isinstance(value, int):
        return Converted(bool(value), f"write {'true' if value else 'false'}")
    raise WrongType(_what(value))


def _number(name: str, value: YamlValue) -> Converted:
    if isinstance(value, bool):
        raise WrongType(_what(value))
    if isinstance(value, int):
        return Converted(float(value) if name == "float" else value)
    if isinstance(value, float):
        if name == "float":
            return Converted(value)
        # Also one such as 1e3, which PyYAML, and so TensorRT-LLM, reads as text.
        raise WrongType(f"{value:g}" + (f" (write {int(value)})" if value.is_integer() else ""))
    if isinstance(value, str) and (_WHOLE if name == "int" else _NUMBER).fullmatch(value.strip()):
        number = int(value) if name == "int" else float(value)
        return Converted(number, "drop the quotes")
    raise WrongType(_what(value))


def _str(value: YamlValue) -> Converted:
    if isinstance(value, str):
        return Converted(value)
    raise WrongType(_what(value))


def _what(value: YamlValue) -> str:
    if isinstance(value, YamlMapping):
        return "a section of keys"
    if isinstance(value, tuple):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, YamlWord):
        return f"{value.text} ({value.advice})"
    return f"'{value[:60]}'" if isinstance(value, str) else str(value)

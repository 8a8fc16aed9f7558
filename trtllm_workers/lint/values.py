"""One YAML value against one type as TensorRT-LLM writes types. Knows no key, no file, no version."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from trtllm_workers.config.values import form, listed, parse, shown
from trtllm_workers.config.yaml_source import YamlMapping, YamlValue, YamlWord

# What the YAML 1.1 reader of TensorRT-LLM takes for a number with an exponent: with a dot, and with the sign.
_PYYAML_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*)?\.[0-9_]*[eE][-+][0-9]+")
_EXPONENT = re.compile(
    r"[-+]?(?P<digits>[0-9]+|[0-9]*\.[0-9]*)[eE](?P<sign>[-+]?)(?P<power>[0-9]+)"
)
_LARGEST = 2**63 - 1
_PLAIN_FORMS: dict[str, str] = {
    "int": form(int),
    "float": form(float),
    "bool": form(bool),
    "str": form(str),
    "Path": form(str),
    "dict": "a section of keys",
    "Any": "a value",
    "object": "a Python object, which YAML cannot hold",
}


@dataclass(frozen=True, slots=True)
class Type:
    """A type expression: ``name`` with ``of`` in brackets; ``words`` are those of a Literal."""

    name: str
    of: tuple[Type, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the words of a Literal, also of one that may be null."""
        return self.words or tuple(word for one in self.of for word in one.choices)


class WrongValue(ValueError):
    """A value that is not of the type. ``hint`` says what small thing to change, ``is_word`` blames YAML."""

    def __init__(self, said: str, hint: str = "", *, is_word: bool = False) -> None:
        super().__init__(said)
        self.said = said
        self.hint = hint
        self.is_word = is_word


@cache
def parse_type(text: str) -> Type:
    """Return a type expression such as ``Optional[List[int]]`` taken apart."""
    name, bracket, inner = text.strip().partition("[")
    if not bracket:
        return Type(name)
    inner = inner.strip().removesuffix("]")
    if name == "Literal":
        return Type(name, words=tuple(re.findall(r"'([^']*)'", inner)))
    of = tuple(parse_type(part) for part in _split(inner))
    return Type("Union", (*of, Type("NoneType"))) if name == "Optional" else Type(name, of)


def described(expected: Type) -> str:
    """Return what a value of the type looks like, for messages."""
    if expected.name == "Union":
        forms = dict.fromkeys(described(one) for one in expected.of if one.name != "NoneType")
        with_null = [*forms, "null"] if Type("NoneType") in expected.of else [*forms]
        return " or ".join(with_null)
    if expected.name in ("List", "Set"):
        items = {"int": "whole numbers", "str": "words", "List": "lists of whole numbers"}
        return f"a list of {items.get(expected.of[0].name, 'values')}"
    if expected.name == "Dict":
        return "a section of keys"
    if expected.name == "Literal":
        return listed(expected.words)
    return _PLAIN_FORMS.get(expected.name, form(str))


def typed(value: YamlValue, expected: Type) -> Any:
    """Return a YAML value as plain Python: lists and dicts, text, numbers. Raises WrongValue."""
    if expected.name == "Union":
        return _first(value, expected)
    if expected.name == "NoneType":
        if value is None:
            return None
        raise WrongValue(said(value))
    if isinstance(value, YamlWord):
        return _word(value, expected)
    check = _CHECKS.get(expected.name, _text)
    return check(value, expected)


def said(value: YamlValue) -> str:
    """Return a value as messages show it."""
    if isinstance(value, YamlWord):
        return value.text
    if isinstance(value, YamlMapping):
        return "a section of keys"
    return "a list" if isinstance(value, tuple) else shown(value)


def plain(value: YamlValue) -> Any:
    """Return a YAML value as plain Python, unchecked; words that YAML 1.1 reads as booleans are booleans."""
    if isinstance(value, YamlMapping):
        return {item.key: plain(item.value) for item in value.items}
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    if isinstance(value, YamlWord):
        return value.text if value.as_bool is None else value.as_bool
    return value


def exponent_as_text(written: str) -> str:
    """Return how to write a number with an exponent that PyYAML reads as text, "" for any other text."""
    match = _EXPONENT.fullmatch(written)
    if match is None or _PYYAML_EXPONENT.fullmatch(written):
        return ""
    digits = match["digits"] if "." in match["digits"] else f"{match['digits']}.0"
    sign = "-" if written.startswith("-") else ""
    return f"{sign}{digits}e{match['sign'] or '+'}{match['power']}"


def _first(value: YamlValue, expected: Type) -> Any:
    """Return the value as the first type of a Union that it is; the likeliest complaint otherwise."""
    complaints: list[WrongValue] = []
    for one in sorted(expected.of, key=lambda one: one.name in ("str", "Path")):
        try:
            return typed(value, one)
        except WrongValue as wrong:
            complaints.append(wrong)
    raise next((one for one in complaints if one.is_word or one.hint), complaints[0])


def _word(value: YamlWord, expected: Type) -> Any:
    if expected.name == "bool" and value.as_bool is not None:
        return value.as_bool  # PyYAML reads it the same way
    raise WrongValue(value.text, value.advice, is_word=True)


def _int(value: YamlValue, expected: Type) -> int:
    if type(value) is int and abs(value) <= _LARGEST:
        return value
    if type(value) is int:
        raise WrongValue("a number too large for TensorRT-LLM")
    if type(value) is float and value.is_integer() and abs(value) <= _LARGEST:
        raise WrongValue(said(value), f"write {int(value)}")
    raise WrongValue(said(value), _quoted(value, int))


def _float(value: YamlValue, expected: Type) -> float:
    if type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    if type(value) is float and math.isfinite(value):
        return value
    raise WrongValue(said(value), _quoted(value, float))


def _bool(value: YamlValue, expected: Type) -> bool:
    if isinstance(value, bool):
        return value
    raise WrongValue(said(value), _quoted(value, bool))


def _text(value: YamlValue, expected: Type) -> str:
    if isinstance(value, str):
        return value
    is_scalar = isinstance(value, int | float)
    raise WrongValue(said(value), f"write '{shown(value)}' in quotes" if is_scalar else "")


def _list(value: YamlValue, expected: Type) -> list[Any]:
    if isinstance(value, tuple):
        return [typed(one, expected.of[0]) for one in value]
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            typed(value, expected.of[0])
        except WrongValue:
            raise WrongValue(said(value)) from None
        raise WrongValue(said(value), f"write [{value}]")
    raise WrongValue(said(value))


def _dict(value: YamlValue, expected: Type) -> dict[Any, Any]:
    if not isinstance(value, YamlMapping):
        raise WrongValue(said(value))
    if not expected.of:
        return {item.key: plain(item.value) for item in value.items}
    key_type, value_type = expected.of
    found: dict[Any, Any] = {}
    for item in value.items:
        key: Any = item.key
        if key_type.name == "int":
            try:
                key = parse(item.key, int)
            except ValueError:
                raise WrongValue(f"a key {shown(item.key)}", "its keys are whole numbers") from None
        try:
            found[key] = typed(item.value, value_type)
        except WrongValue as wrong:
            advice = wrong.hint or f"its values are {described(value_type)}"
            raise WrongValue(
                f"{wrong.said} for {shown(item.key)}", advice, is_word=wrong.is_word
            ) from None
    return found


def _any(value: YamlValue, expected: Type) -> Any:
    return plain(value)


def _object(value: YamlValue, expected: Type) -> Any:
    raise WrongValue(said(value))


def _literal(value: YamlValue, expected: Type) -> str:
    return _text(value, expected)  # which word it must be is for the caller to say


_CHECKS: dict[str, Callable[[YamlValue, Type], Any]] = {
    "int": _int,
    "float": _float,
    "bool": _bool,
    "List": _list,
    "Set": _list,
    "Dict": _dict,
    "dict": _dict,
    "Any": _any,
    "object": _object,
    "Literal": _literal,
}


def _quoted(value: YamlValue, kind: type) -> str:
    if not isinstance(value, str):
        return ""
    try:
        parse(value, kind)
    except ValueError:
        return ""
    return "drop the quotes"


def _split(text: str) -> Iterator[str]:
    """Yield the parts between commas that stand outside brackets."""
    depth, start = 0, 0
    for index, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]

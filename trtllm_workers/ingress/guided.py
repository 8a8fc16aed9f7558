"""What an answer's text must match, from the fields that say so. Knows no worker and no engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgspec

from trtllm_workers.errors import RequestError
from trtllm_workers.ingress.schema import Common, ResponseFormat, StructuredOutputs
from trtllm_workers.types import GuidedDecoding, GuidedKind

# Of one schema, expression or grammar: engines compile it before the first token.
MAX_GUIDED_BYTES = 64 << 10

_FORMATS = ("text", "json_object", "json_schema")
_META = re.compile(r"[\\.^$*+?()\[\]{}|]")

# A pattern's pieces: escaped characters, classes that hold no bracket, and single characters. Classes
# that may be read in two ways, as `[]a]` or `[a[b]]`, are left apart.
_PIECE = re.compile(r"\\.|\[\^?(?:[^\[\]\\^]|\\.)(?:[^\[\]\\]|\\.)*\]|.", re.DOTALL)
_ESCAPED = re.compile(r"\\.", re.DOTALL)
# Quoted text, comments and patterns with comments, where they are known, may hold any bracket.
_QUOTES = re.compile(r"\\Q|\(\?#|\(\?[A-Za-z^-]*x")

_FIELDS = (
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
    "structured_outputs",
)
_fields = attrgetter(*_FIELDS)

_Found = tuple[str, GuidedDecoding]


def guided_of(
    ask: Common, response_format: ResponseFormat | None
) -> tuple[str, GuidedDecoding | None]:
    """Return which field says what the answer must match, and that; ("", None) when none does.

    Raises RequestError naming the field at fault, and both when two of them say something.
    """
    if response_format is None and _fields(ask).count(None) == len(_FIELDS):
        return "", None
    found = _response_format(response_format) if response_format is not None else []
    outputs = ask.structured_outputs or StructuredOutputs()
    fields: tuple[tuple[str, Any, Callable[[Any, str], GuidedDecoding]], ...] = (
        ("guided_json", ask.guided_json, _schema),
        ("guided_regex", ask.guided_regex, _regex),
        ("guided_grammar", ask.guided_grammar, _grammar),
        ("guided_choice", ask.guided_choice, _choice),
        ("structured_outputs.json", outputs.json, _schema),
        ("structured_outputs.regex", outputs.regex, _regex),
        ("structured_outputs.grammar", outputs.grammar, _grammar),
        ("structured_outputs.choice", outputs.choice, _choice),
        ("structured_outputs.json_object", outputs.json_object or None, _any_json),
    )
    found += [(field, make(value, field)) for field, value, make in fields if value is not None]
    if not found:
        return "", None
    if len(found) > 1:
        first, second = found[0][0], found[1][0]
        raise RequestError(
            f"{first} and {second} both say what the answer must match; send one of them",
            param=second,
        )
    field, guided = found[0]
    return field.partition(".")[0], guided


def _response_format(wanted: ResponseFormat) -> list[_Found]:
    if wanted.type not in _FORMATS:
        raise RequestError(
            f"response_format.type must be one of {', '.join(_FORMATS)}; not '{wanted.type[:40]}'",
            param="response_format.type",
        )
    if (wanted.json_schema is not None) != (wanted.type == "json_schema"):
        path = "response_format.json_schema"
        wrong = (
            "is missing"
            if wanted.json_schema is None
            else f"belongs to type json_schema, not {wanted.type}"
        )
        raise RequestError(f"{path} {wrong}", param=path)
    if wanted.json_schema is not None:
        schema = _schema(wanted.json_schema.schema, "response_format.json_schema.schema")
        return [("response_format", schema)]
    if wanted.type == "text":
        return []
    return [("response_format", GuidedDecoding(GuidedKind.JSON_OBJECT))]


def _any_json(_wanted: bool, _field: str) -> GuidedDecoding:
    return GuidedDecoding(GuidedKind.JSON_OBJECT)


def _schema(schema: dict[str, Any] | str, field: str) -> GuidedDecoding:
    if isinstance(schema, str):
        _check_size(schema, field)
        try:
            parsed = msgspec.json.decode(schema)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise RequestError(f"{field} is not JSON: {error}", param=field) from None
        except RecursionError:
            raise RequestError(f"{field} is nested too deeply", param=field) from None
        if not isinstance(parsed, dict):
            raise RequestError(f"{field} must be a JSON schema, an object", param=field)
        return GuidedDecoding(GuidedKind.JSON_SCHEMA, schema)
    text = msgspec.json.encode(schema).decode()
    _check_size(text, field)
    return GuidedDecoding(GuidedKind.JSON_SCHEMA, text)


def _regex(pattern: str, field: str) -> GuidedDecoding:
    _check_text(pattern, field)
    fault = fault_of(pattern)
    if fault:
        raise RequestError(f"{field} is no regular expression: {fault}", param=field)
    return GuidedDecoding(GuidedKind.REGEX, pattern)


def _grammar(grammar: str, field: str) -> GuidedDecoding:
    _check_text(grammar, field)
    return GuidedDecoding(GuidedKind.GRAMMAR, grammar)


def _choice(texts: list[str], field: str) -> GuidedDecoding:
    if not texts:
        raise RequestError(f"{field} is an empty list", param=field)
    if not all(texts):
        raise RequestError(f"{field} holds an empty text", param=field)
    # Not re.escape: it also escapes characters, such as a space, that other dialects leave alone.
    pattern = "|".join(_META.sub(r"\\\g<0>", text) for text in dict.fromkeys(texts))
    _check_size(pattern, field)
    return GuidedDecoding(GuidedKind.REGEX, f"({pattern})")


def _check_text(text: str, field: str) -> None:
    if not text:
        raise RequestError(f"{field} is empty", param=field)
    _check_size(text, field)


def _check_size(text: str, field: str) -> None:
    size = len(text.encode())
    if size > MAX_GUIDED_BYTES:
        raise RequestError(
            f"{field} has {size} bytes; at most {MAX_GUIDED_BYTES} are accepted", param=field
        )


def fault_of(pattern: str) -> str:
    """Return what makes ``pattern`` no regular expression in any dialect; "" when nothing surely does.

    Dialects differ, and which one counts only the engine knows: what one of them may take passes.
    """
    if _QUOTES.search(pattern):
        return ""
    if pattern[0] in "*+?":
        return f"there is nothing before the '{pattern[0]}' at its beginning that could be repeated"
    depth = 0
    for match in _PIECE.finditer(pattern):
        piece = match[0]
        if piece == "\\":
            return "it ends with a backslash that escapes nothing"
        if piece == "[":
            closed = "]" in _ESCAPED.sub("", pattern[match.start() :])
            return "" if closed else "a '[' is never closed by a ']'"
        if piece == "(":
            depth += 1
        elif piece == ")":
            depth -= 1
            if depth < 0:
                return "a ')' closes no '('"
    return "a '(' is never closed by a ')'" if depth else ""

"""Body bytes to a schema struct, with errors that name the field or the byte. Judges no values."""

from __future__ import annotations

import difflib
import re
from typing import TypeVar

import msgspec

from trtllm_workers.errors import RequestError

T = TypeVar("T")

_PATH = re.compile(r"^(.*?)(?: - at (?:the key of )?`\$(.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_POSITION = re.compile(r"\(byte (\d+)\)")
_NOT_A_NUMBER = re.compile(rb'"([^"\\]{1,64})"\s*:\s*(-?(?:NaN|Infinity|inf|nan))\b')


def parse_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode a request body. Raises RequestError: malformed JSON with its byte position, a wrong
    type with the field's path, an unknown field with the nearest known name.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), decoder.type) from None
    except msgspec.DecodeError as error:
        raise _malformed(body, str(error)) from None
    except UnicodeDecodeError as error:
        at = _first_invalid_byte(body)
        raise RequestError(
            f"the request body is not valid UTF-8: byte {at} is 0x{body[at]:02x} ({error.reason})"
        ) from None
    except RecursionError:
        raise RequestError("the request body is nested too deeply") from None


def _first_invalid_byte(body: bytes) -> int:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _malformed(body: bytes, message: str) -> RequestError:
    if not body.strip():
        return RequestError("the request body is empty; send a JSON object")
    if "truncated" in message:
        return RequestError(f"the request body is not JSON: it ends too early, at byte {len(body)}")
    position = _POSITION.search(message)
    if position is None:
        return RequestError(f"the request body is not JSON: {message}")
    at = int(position[1])
    for number in _NOT_A_NUMBER.finditer(body):
        if number.start(2) <= at <= number.end(2):
            field = number[1].decode(errors="replace")
            value = number[2].decode()
            return RequestError(
                f"'{field}' must be a finite number; {value} (at byte {at}) is not JSON",
                param=field,
            )
    nearby = body[max(0, at - 20) : at + 20].decode(errors="replace")
    what = message.removeprefix("JSON is malformed: ").partition(" (byte")[0]
    return RequestError(f"the request body is not JSON: {what} at byte {at}, near {nearby!r}")


def _invalid(message: str, body_type: object) -> RequestError:
    split = _PATH.match(message)
    text, path = (split[1], split[2] or "") if split else (message, "")
    path = path.removeprefix(".")
    unknown = _UNKNOWN.match(text)
    if unknown is not None:
        field = unknown[1]
        whole = f"{path}.{field}" if path else field
        near = "" if path else _nearest(field, body_type)
        return RequestError(f"unknown field '{whole}'{near}", param=whole)
    missing = _MISSING.match(text)
    if missing is not None:
        whole = f"{path}.{missing[1]}" if path else missing[1]
        return RequestError(f"required field '{whole}' is missing", param=whole)
    expected = text[:1].lower() + text[1:]
    if not path:
        return RequestError(f"the request body: {expected}")
    return RequestError(f"'{path}': {expected}", param=path)


def _nearest(field: str, body_type: object) -> str:
    names = getattr(body_type, "__struct_fields__", ())
    near = difflib.get_close_matches(field, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""

"""Takes secrets out of what is written for others to read: by name, by value, by their look. Pure.

A secret is known in three ways, and each is used wherever text goes:

* the name beside it says so (``HF_TOKEN=…``, ``password: …``, ``--nats-token …``, ``?sig=…``);
* its value was seen under such a name elsewhere (``Redactor(values)``), also as it stands in JSON,
  in a URL or in base64;
* it looks like one (``Bearer …``, ``user:password@host`` in a URL, ``hf_…``, a private key).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"

# A shorter value stands in too much innocent text to be replaced wherever it occurs.
_SHORTEST_VALUE = 6
_WORDS = (
    r"secrets?|passw(?:or)?d|passphrase|passwd|pwd|credentials?|authorization|auth|cookie"
    r"|api[_.-]?keys?|access[_.-]?keys?|private[_.-]?keys?|secret[_.-]?keys?|signature|sig|token"
)
# "token" must end the name: tokens, token_ids and max_num_tokens are counts and numbers.
_SECRET_NAME = re.compile(
    r"(?:^|[^a-z0-9])(?:"
    r"secrets?|passw(?:or)?d|passphrase|passwd|pwd|credentials?|authorization|cookie"
    r"|api_?keys?|access_?keys?|private_?keys?|secret_?keys?|signature|sig"
    r"|(?:auth_?)?token(?=$|_(?:value|file_content)$)|auth|keys?(?=$)"
    r")(?:$|[^a-z0-9])",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Names that end in "key" or "auth" and hold a path, a switch or a number.
_INNOCENT_NAME = re.compile(
    r"(?:^|_)(?:etcd|nats|plane)_key$|(?:^|_)(?:public|sort|cache|group)_?key$|^(?:OLD)?PWD$|^keys?$",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"(?:true|false|yes|no|none|null|on|off|set|\d{1,4}(?:\.\d+)?)", re.IGNORECASE)

# Repetitions have bounds: a long line without white space must not take quadratic time.
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_HEADER = re.compile(
    r"(\b(?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)(?!\[redacted)[^\r\n\"']+", re.IGNORECASE
)
_SCHEME = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_USER_IN_URL = re.compile(r"([a-z][a-z0-9+.-]{0,20}://)[^\s/?#\"'<>]*@", re.IGNORECASE)
# A password that holds a slash or a question mark, which a URL should have had escaped.
_ODD_USER_IN_URL = re.compile(
    r"([a-z][a-z0-9+.-]{0,20}://)[^\s/:@\"'\[\]]+:(?!\d{1,5}(?:[/?#,\s]|$))[^\s\"'<>]*@",
    re.IGNORECASE,
)
_IN_QUERY = re.compile(rf"([?&;](?:[\w.-]{{0,60}}[_.-])?(?:{_WORDS})=)[^&\s\"'<>;]+", re.IGNORECASE)
_FLAG = re.compile(
    r"(--?(?:[A-Za-z][\w.-]{0,60})?(?:secret|passw(?:or)?d|passphrase|token|credentials?|api[_-]?key)(?:[ =]|\s+))"
    r"(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"']+)",
    re.IGNORECASE,
)
_PAIR = re.compile(
    r"(?P<name>[A-Za-z_][\w.-]{0,80})(?P<between>[\"']?\s*(?:=>|[:=])\s*)"
    r"(?P<value>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|[^\s,;\"'{}()\[\]&][^\s,;\"'{}()&]*)"
)
_LOOKS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bnvapi-[\w-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bAKIA[A-Z0-9]{16}\b"
    r"|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)


def is_secret_name(name: str) -> bool:
    """Return whether what stands under that name must not be written anywhere."""
    words = _CAMEL.sub("_", name)
    return _SECRET_NAME.search(words) is not None and _INNOCENT_NAME.search(words) is None


def secret_values(named: Mapping[str, str]) -> set[str]:
    """Return the values under secret names, and passwords inside URLs under any name."""
    found = {value for name, value in named.items() if is_secret_name(name)}
    for value in named.values():
        for user in re.findall(r"://([^\s/?#]*)@", value):
            found.add(user)
            found.add(user.partition(":")[2] or user)
    return {
        value for value in found if len(value) >= _SHORTEST_VALUE and not _PLAIN.fullmatch(value)
    }


class Redactor:
    """Takes secrets out of text and of values. ``values`` are secrets known from elsewhere."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        known: set[str] = set()
        for value in values:
            if len(value) >= _SHORTEST_VALUE:
                known.update(_spellings(value))
        longest_first = sorted(known, key=lambda one: (-len(one), one))
        self._known = re.compile("|".join(map(re.escape, longest_first))) if known else None

    def text(self, text: str) -> str:
        """Return text without secrets; lines stay lines."""
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        text = _PRIVATE_KEY.sub(REDACTED, text)
        text = _HEADER.sub(rf"\1{REDACTED}", text)
        text = _SCHEME.sub(rf"\1 {REDACTED}", text)
        text = _USER_IN_URL.sub(rf"\1{REDACTED}@", text)
        text = _ODD_USER_IN_URL.sub(rf"\1{REDACTED}@", text)
        text = _IN_QUERY.sub(rf"\1{REDACTED}", text)
        text = _FLAG.sub(rf"\1{REDACTED}", text)
        text = _PAIR.sub(_without_value, text)
        return _LOOKS.sub(REDACTED, text)

    def words(self, argv: Sequence[str]) -> tuple[str, ...]:
        """Return a command's words without secrets; one stands in its own word or after its flag."""
        found: list[str] = []
        for before, word in zip(("", *argv), argv, strict=False):
            is_value = before.startswith("-") and "=" not in before and is_secret_name(before)
            found.append(REDACTED if is_value and not word.startswith("-") else self.text(word))
        return tuple(found)

    def value(self, name: str, value: Any) -> Any:
        """Return a value as it may be written under ``name``; containers are looked through."""
        if isinstance(value, Mapping):
            return {key: self.value(str(key), inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(name, inner) for inner in value]
        if isinstance(value, str):
            if is_secret_name(name) and value:
                return REDACTED
            return self.text(value)
        return value

    def variables(self, environ: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
        """Return the variables of ``names`` as they may be written, in alphabetical order."""
        return {name: self.value(name, environ[name]) for name in sorted(names)}


def anonymous(text: str, user: str, home: str) -> str:
    """Return text in which a user's name and home folder stand as ``user``."""
    folders = {home.rstrip("/"), f"/home/{user}", f"/Users/{user}"} - {"", "/", "/root"}
    for folder in sorted(folders, key=len, reverse=True):  # one may end like another
        text = text.replace(folder, "/home/user")
    if user and user != "root":
        text = re.sub(rf"(?<![\w]){re.escape(user)}(?![\w])", "user", text)
    return text


def _spellings(value: str) -> set[str]:
    """Return how a value may stand in text: as it is, escaped for JSON or a URL, in base64."""
    return {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        quote(value, safe=""),
        quote(value),
        quote_plus(value),
        base64.b64encode(value.encode()).decode().rstrip("="),
    }


def _without_value(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    quotes = value[0] if value[0] in "\"'" else ""
    inside = value.strip(quotes) if quotes else value
    if not is_secret_name(name) or inside.startswith(REDACTED) or not inside:
        return found[0]
    # "first token: 12 ms" is a figure; a password may be one, too.
    if re.search(r"token|auth|key", name, re.IGNORECASE) and _PLAIN.fullmatch(inside):
        return found[0]
    return f"{name}{found['between']}{quotes}{REDACTED}{quotes}"

"""Which role an engine config is for: told by a prefix, or by a word in its name. Reads no file."""

from __future__ import annotations

import re
from pathlib import Path

from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

_WORDS = {
    "prefill": Role.PREFILL,
    "ctx": Role.PREFILL,
    "context": Role.PREFILL,
    "decode": Role.DECODE,
    "gen": Role.DECODE,
    "generation": Role.DECODE,
    "encode": Role.ENCODE,
    "agg": Role.AGGREGATED,
    "aggregated": Role.AGGREGATED,
}


def role_of(path: Path) -> Role:
    """Return the role that the file's name tells, else that of its folder, else aggregated."""
    for part in (path.stem, path.parent.name):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return Role.AGGREGATED


def role_and_path(text: str) -> tuple[Role, Path]:
    """Return role and file of ``[ROLE=]FILE``. Raises ConfigError for a role that is none."""
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        return role_of(Path(text)), Path(text)
    if name.lower() not in _WORDS:
        roles = ", ".join(str(role) for role in Role)
        raise ConfigError(f"'{name}' in {text} is no role; one of: {roles}", param="files")
    return _WORDS[name.lower()], Path(rest)

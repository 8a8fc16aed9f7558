"""Which host this process runs on, for handles that mean nothing on another."""

from __future__ import annotations

import uuid
from functools import cache
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def node_id() -> str:
    """Return a name that no other running host has; containers of one host share it."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return f"{uuid.getnode():x}"

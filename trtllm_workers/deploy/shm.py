"""Names in /dev/shm that workers of a run make, and their removal. Touches no other name.

TensorRT-LLM's expert load balancer keeps the experts of a host in shared memory, under a name that all of
its instances share unless told otherwise, and a killed instance leaves it behind: gigabytes until reboot.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

EPLB_SHM_NAME = "TRTLLM_EPLB_SHM_NAME"
_FOLDER = Path("/dev/shm")
_PREFIX = "trtllm_launch_"
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9-]")


def shm_name(run_id: str, process: str) -> str:
    """Return the name under which a process of a run keeps shared memory."""
    return f"{_PREFIX}{run_id}_{_NOT_IN_A_NAME.sub('-', process)}"


def remove_left_overs(run_id: str, process: str | None = None, folder: Path = _FOLDER) -> int:
    """Remove what a process of a run, or all of them, left; return how many files that were.

    Only for processes that have ended.
    """
    removed = 0
    for path in left_overs(run_id, process, folder):
        with suppress(OSError):  # somebody else's, or gone by itself
            path.unlink()
            removed += 1
    return removed


def left_overs(run_id: str, process: str | None = None, folder: Path = _FOLDER) -> list[Path]:
    """Return the files of a process of a run, or of all of them.

    TensorRT-LLM appends ``_`` and a suffix to the name.
    """
    if not run_id:
        return []
    name = f"{_PREFIX}{run_id}" if process is None else shm_name(run_id, process)
    return [
        child
        for child in _children(folder)
        if child.name == name or child.name.startswith(f"{name}_")
    ]


def runs_with_memory(folder: Path = _FOLDER) -> set[str]:
    """Return the ids of all runs, of whomever, that have names here."""
    names = [child.name for child in _children(folder) if child.name.startswith(_PREFIX)]
    return {name.removeprefix(_PREFIX).partition("_")[0] for name in names} - {""}


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []

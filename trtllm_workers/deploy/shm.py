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
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9-]")


def shm_name(run_id: str, process: str) -> str:
    """Return the name under which a process of a run keeps shared memory."""
    return f"trtllm_launch_{run_id}_{_NOT_IN_A_NAME.sub('-', process)}"


def remove_left_overs(run_id: str, process: str | None = None, folder: Path = _FOLDER) -> int:
    """Remove what a process of a run, or all of them, left; return how many files that were.

    Only for processes that have ended. TensorRT-LLM appends ``_`` and a suffix to the name.
    """
    if not run_id:
        return 0
    name = f"trtllm_launch_{run_id}" if process is None else shm_name(run_id, process)
    removed = 0
    try:
        children = list(folder.iterdir())
    except OSError:
        return 0
    for child in children:
        if child.name == name or child.name.startswith(f"{name}_"):
            with suppress(OSError):  # somebody else's, or gone by itself
                child.unlink()
                removed += 1
    return removed

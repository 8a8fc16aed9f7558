"""Names in /dev/shm that workers of a run make, and their removal. Touches no other name.

TensorRT-LLM's expert load balancer keeps the experts of a host in shared memory, under a name that all of
its instances share unless told otherwise, and a killed instance leaves it behind: gigabytes until reboot.
"""

from __future__ import annotations

import os
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


# What MPI and NCCL make there for the ranks of one host, and leave behind when those are killed.
_OF_WORLDS = ("mpich_shm_", "vader_segment.", "sm_segment.", "nccl-", "psm2_shm.", "cuda.shm.")


def remove_unused_of_worlds(folder: Path = _FOLDER) -> int:
    """Remove our user's names of MPI and NCCL that no process has mapped or open; return how many.

    For a node that is ours until the job ends: what a world of the same user makes at this very moment, and
    has not mapped yet, would lose its name.
    """
    used = _in_use(str(folder))
    removed = 0
    for child in _children(folder):
        if not child.name.startswith(_OF_WORLDS) or str(child) in used:
            continue
        with suppress(OSError):
            if child.stat().st_uid == os.getuid():
                child.unlink()
                removed += 1
    return removed


def _in_use(below: str) -> set[str]:
    """Return the files under a folder that processes have mapped or open, as far as we may look."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                at = line.find(below)
                if at >= 0:
                    found.add(line[at:].removesuffix(" (deleted)"))
        with suppress(OSError):
            for entry in (process / "fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(entry))
    return found

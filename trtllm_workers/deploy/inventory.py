"""What this host has, looked up once. Decides nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from trtllm_workers.deploy.plan import Inventory

_PRESETS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def take_inventory(environ: Mapping[str, str]) -> Inventory:
    """Return what a plan may use here; GPUs are counted by their device files, in no time."""
    return Inventory(
        python=sys.executable,
        cwd=Path.cwd(),
        num_cpus=len(os.sched_getaffinity(0)),
        gpus=gpu_devices(),
        preset=frozenset(name for name in _PRESETS if environ.get(name)),
    )


def gpu_devices() -> tuple[str, ...]:
    """Return the indices of NVIDIA devices this host shows, as CUDA_VISIBLE_DEVICES takes them."""
    numbers = sorted(
        int(path.name.removeprefix("nvidia"))
        for path in Path("/dev").glob("nvidia[0-9]*")
        if path.name.removeprefix("nvidia").isdigit()
    )
    return tuple(str(index) for index, _ in enumerate(numbers))

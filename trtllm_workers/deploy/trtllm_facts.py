"""Finds out what ``trtllm_host`` judges. The package itself is not imported: that takes long and starts MPI."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from trtllm_workers.deploy.ask import ask
from trtllm_workers.deploy.inventory import find_mpirun, visible_gpus
from trtllm_workers.deploy.shares import CUDA
from trtllm_workers.deploy.trtllm_host import Device, Facts

_SMI_TIMEOUT_S = 15.0
_SMI_QUERY = "--query-gpu=driver_version,compute_cap,memory.total"
_OWN_UCX = ("ucxx-cu12", "libucx-cu12", "ucxx-cu13", "libucx-cu13")
# Where NVIDIA's containers keep a newer CUDA library for older drivers.
_COMPAT = ("compat/libcuda.so*", "compat/lib*/libcuda.so*")


def quick_facts(environ: Mapping[str, str]) -> Facts:
    """Return what tells which engine ``auto`` takes; starts no process."""
    return Facts(
        version=trtllm_version(),
        python=sys.version_info[:2],
        gpus=visible_gpus(environ),
        cuda_visible=environ.get(CUDA),
        in_slurm_job=bool(environ.get("SLURM_JOB_ID")),
    )


def find_facts(environ: Mapping[str, str], *, thorough: bool = False) -> Facts:
    """Return what a start must know; ``thorough`` adds what is only worth a note."""
    facts = quick_facts(environ)
    if facts.version is not None:
        devices, fault = _devices(environ)
        facts = dataclasses.replace(
            facts, devices=devices, smi_fault=fault, has_cuda_compat=_has_compat()
        )
    return _thorough(facts, environ) if thorough else facts


def trtllm_version() -> str | None:
    """Return TensorRT-LLM's version; "" when it does not say; None when it is not installed."""
    try:
        spec = importlib.util.find_spec("tensorrt_llm")
    except (ImportError, ValueError):
        return None
    # A mere folder of that name, as where the sources were cloned, has no origin.
    if spec is None or spec.origin is None:
        return None
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("tensorrt-llm")
    return ""


def parse_devices(text: str) -> tuple[Device, ...]:
    """Return the GPUs of nvidia-smi's answer; columns that a GPU does not tell are 0."""
    devices = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[0][:1].isdigit():
            devices.append(Device(cells[0], _number(cells[1]), int(_number(cells[2]))))
    return tuple(devices)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # [N/A]
        return 0.0


def _devices(environ: Mapping[str, str]) -> tuple[tuple[Device, ...], str]:
    program = shutil.which("nvidia-smi", path=environ.get("PATH", os.defpath))
    if program is None:
        return (), ""
    said = ask([program, _SMI_QUERY, "--format=csv,noheader,nounits"], _SMI_TIMEOUT_S)
    if isinstance(said, str):
        return (), said
    return parse_devices(said[0]), ""


def _has_compat() -> bool:
    return any(any(Path("/usr/local/cuda").glob(pattern)) for pattern in _COMPAT)


def _thorough(facts: Facts, environ: Mapping[str, str]) -> Facts:
    installed = facts.version is not None
    mpirun, flavour = find_mpirun(environ)
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shm_bytes = None
    with suppress(OSError):
        shm_bytes = shutil.disk_usage("/dev/shm").total
    return dataclasses.replace(
        facts,
        unmet=tuple(_unmet()) if installed else (),
        own_ucx=tuple(name for name in _OWN_UCX if _version(name)) if installed else (),
        shm_bytes=shm_bytes,
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        mpirun=mpirun,
        mpi_flavour=flavour,
    )


def _unmet() -> Iterator[str]:
    """Yield the requirements in TensorRT-LLM's metadata that this environment breaks."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # it comes with TensorRT-LLM's own requirements
        return
    wanted: list[str] = []
    with suppress(metadata.PackageNotFoundError):
        wanted = metadata.requires("tensorrt-llm") or []
    for text in wanted:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = _version(requirement.name)
        if have is None:
            yield f"{requirement.name} (missing)"
        elif not requirement.specifier.contains(have, prereleases=True):
            yield f"{requirement.name}{requirement.specifier} (here {have})"


def _version(distribution: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None

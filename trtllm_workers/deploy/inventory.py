"""What this host has, looked up once. Decides nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from trtllm_workers.deploy.ask import ask
from trtllm_workers.deploy.nats import nats_program
from trtllm_workers.deploy.plan import Inventory
from trtllm_workers.deploy.shares import CUDA, THREADS

# Any one of them will do: NIXL has a module for each CUDA version.
_TRANSPORT_MODULES = {"ucx": ("ucxx",), "nixl": ("nixl_cu12", "nixl_cu13", "nixl")}
_MPIRUN_TIMEOUT_S = 5.0
# How mpirun --version names whose it is; MPICH's program is called Hydra.
_FLAVOURS = (("(Open MPI)", "openmpi"), ("HYDRA build details", "mpich"))


def take_inventory(environ: Mapping[str, str], engine: str = "") -> Inventory:
    """Return what a plan may use here; GPUs are counted by their device files, in no time.

    Only for engine trtllm is mpirun looked for and asked whose it is.
    """
    mpirun, flavour = find_mpirun(environ) if engine == "trtllm" else ("", "")
    mpiexec = mpiexec_path()
    lacks = [] if mpiexec else ["mpiexec"]
    if not _has_module("mpi4py"):
        lacks.append("mpi4py")
    return Inventory(
        python=sys.executable,
        cwd=Path.cwd(),
        num_cpus=len(os.sched_getaffinity(0)),
        gpus=visible_gpus(environ),
        preset=frozenset({THREADS} if environ.get(THREADS) else ()),
        mpiexec=mpiexec,
        mpi_lacks=tuple(lacks),
        transports_lack={
            name: modules[0]
            for name, modules in _TRANSPORT_MODULES.items()
            if not any(_has_module(module) for module in modules)
        },
        queue_lacks=_queue_lacks(),
        vision_lacks=vision_lacks(engine),
        mpirun=mpirun,
        mpi_flavour=flavour,
        in_slurm_job=engine == "trtllm" and bool(environ.get("SLURM_JOB_ID")),
        host_env=environ,
    )


def _queue_lacks() -> tuple[str, ...]:
    """Return what is missing of the prefill queue's client and server."""
    client = () if _has_module("nats") else ("nats-py",)
    return client if nats_program() else (*client, "nats-server")


def vision_packages(engine: str) -> dict[str, str]:
    """Return the packages that images need, and what is imported of each.

    The other engines have no use for the vision towers of transformers.
    """
    packages = {"pillow": "PIL", "blake3": "blake3"}
    return packages | ({"transformers": "transformers"} if engine == "torch" else {})


def vision_lacks(engine: str) -> tuple[str, ...]:
    """Return the missing packages that images need."""
    return tuple(
        name for name, module in vision_packages(engine).items() if not _has_module(module)
    )


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def mpiexec_path() -> str:
    """Return the path of mpiexec, or "" when there is none.

    Only the one beside the interpreter: another MPI's would start ranks that do not find each other.
    """
    path = Path(sys.executable).with_name("mpiexec")
    return str(path) if os.access(path, os.X_OK) else ""


def find_mpirun(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the path of mpirun and whose it is (``openmpi``, ``mpich``, "": neither); or "", ""."""
    # TensorRT-LLM brings no MPI: what is on PATH is the library that its mpi4py was built with.
    path = shutil.which("mpirun", path=environ.get("PATH", os.defpath))
    if path is None:
        return "", ""
    said = ask([path, "--version"], _MPIRUN_TIMEOUT_S)
    return path, mpi_flavour(said[0]) if isinstance(said, tuple) else ""


def mpi_flavour(version_text: str) -> str:
    """Return whose mpirun wrote this about its version: ``openmpi``, ``mpich`` or ""."""
    return next((flavour for mark, flavour in _FLAVOURS if mark in version_text), "")


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the devices that CUDA_VISIBLE_DEVICES leaves visible; all when it is not set."""
    if CUDA not in environ:
        return gpu_devices()
    named = [one.strip() for one in environ[CUDA].split(",")]
    # CUDA takes an entry that is no device, -1 by custom, as the end of the list.
    end = next((at for at, one in enumerate(named) if one in ("", "-1", "none")), len(named))
    return tuple(named[:end])


def gpu_devices() -> tuple[str, ...]:
    """Return the indices of NVIDIA devices this host shows, as CUDA_VISIBLE_DEVICES takes them."""
    numbers = sorted(
        int(path.name.removeprefix("nvidia"))
        for path in Path("/dev").glob("nvidia[0-9]*")
        if path.name.removeprefix("nvidia").isdigit()
    )
    return tuple(str(index) for index, _ in enumerate(numbers))

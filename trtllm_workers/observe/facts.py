"""What one process sees of its surroundings: variables, libraries, networks, limits. Loads nothing.

Each process of a run writes this beside its status file, at its start and again when it is ready, when
its libraries are loaded::

    <run>/status/worker-0.json   ──▶   <run>/facts/worker-0.json, worker-0.1.json for its rank 1

so that ranks and runs can be compared afterwards, also when the process is gone. Secrets are taken out
before anything is written. Everything comes from /proc, /sys and package metadata, in a few milliseconds.
"""

from __future__ import annotations

import os
import re
import resource
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from trtllm_workers.observe.redact import Redactor, secret_values

Moment = Literal["start", "ready"]

# Variables that change what a rank does; of all others only the names are kept.
_FAMILIES = re.compile(
    r"(UCX|NCCL|NIXL|TRTLLM|TLLM|TRT_LLM|HF|OMPI_MCA|PMIX_MCA|MPICH|FI|CUDA|NVIDIA|NVSHMEM|GLOO|OMP|GOMP"
    r"|KMP|MKL|TORCH|PYTORCH|PYTHON|TRANSFORMERS|TOKENIZERS|LD|SLURM|MALLOC)_|PYTHON(PATH|HOME)$|PATH$"
    r"|(HTTP|HTTPS|NO|ALL)_PROXY$|(http|https|no|all)_proxy$|RDMAV_|IBV_|MLX5_"
)
# The launcher's own; its copy for ranks repeats the others' values.
_OURS = "TRTLLM_LAUNCH_"
# Addresses and keys that an MPI starter gives each rank.
_OF_A_STARTER = re.compile(r"TLLM_SPAWN_PROXY_|SLURM_(?!MPI_TYPE|JOB_ID|NNODES|JOB_PARTITION)")
# library in /proc/<pid>/maps → our name of it. Wheels may append a hash: libucp-1a2b3c4d.so.0.0.0.
_LIBRARY = re.compile(
    r"/(lib(?:ucp|ucxx|mpi|pmix|nccl|cudart|cuda|nvidia-ml|nixl|nixl_common|ibverbs|fabric|torch|torch_cuda"
    r"|tensorrt_llm|nvinfer|nvshmem_host|gomp|iomp5)|plugin_UCX|MPI\.[\w.-]+)"
    r"(?:-[0-9a-f]{8})?\.so(?:\.[\d.]+)?$"
)
_VERSION = re.compile(r"\.so\.(\d[\d.]*)$")
PACKAGES = (
    "trtllm-launch",
    "tensorrt_llm",
    "torch",
    "transformers",
    "tokenizers",
    "ucxx-cu12",
    "libucx-cu12",
    "nixl-cu12",
    "mpi4py",
    "mpich",
    "nvidia-nccl-cu12",
    "nats-py",
    "aetcd",
    "msgspec",
    "uvloop",
)
_LIMITS = {
    "nofile": resource.RLIMIT_NOFILE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "nproc": resource.RLIMIT_NPROC,
    "stack": resource.RLIMIT_STACK,
    "core": resource.RLIMIT_CORE,
}
_SHM = Path("/dev/shm")
_NETS = Path("/sys/class/net")
_RDMA = Path("/sys/class/infiniband")


class Library(msgspec.Struct, frozen=True):
    """A library that is mapped into the process. ``version`` is what its file name says, or ""."""

    name: str
    path: str
    version: str = ""


class Nic(msgspec.Struct, frozen=True):
    """A network interface: its addresses, whether it is up, Mbit/s (0: unknown)."""

    name: str
    addresses: tuple[str, ...] = ()
    state: str = ""
    mtu: int = 0
    mbit_per_s: int = 0


class Limit(msgspec.Struct, frozen=True):
    """A limit of ``ulimit``; -1 is none."""

    soft: int
    hard: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What ``<run>/facts/<process>[.rank].json`` holds.

    ``environment`` is what this process was to work with, secrets shown as such; ``other_variables`` are
    the names of the rest. ``libraries`` is what is mapped at that ``moment``. ``advertised`` is the address
    that others are told, ``nic`` the interface it belongs to ("": none of this host's).
    """

    process: str
    rank: int | None
    role: str
    moment: Moment
    written_at_s: float
    host: str
    boot_id: str
    pid: int
    python: str
    kernel: str
    num_cpus: int
    environment: dict[str, str]
    other_variables: tuple[str, ...]
    libraries: tuple[Library, ...]
    packages: dict[str, str]
    nics: tuple[Nic, ...]
    advertised: str = ""
    nic: str = ""
    rdma_devices: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    limits: dict[str, Limit] = {}
    shm_bytes: int = 0
    shm_free_bytes: int = 0

    @property
    def who(self) -> str:
        """The process as people call it: ``worker-0``, ``worker-0 rank 1``."""
        return self.process if self.rank is None else f"{self.process} rank {self.rank}"


class FactsFile:
    """Writes the facts of this process beside ``status_file``; without one it does nothing.

    A file that cannot be written is left out: a process must not fail because nobody can look at it.
    ``environ`` is what the process works with, taken before any library changed it.
    """

    def __init__(
        self,
        status_file: Path | None,
        environ: Mapping[str, str],
        *,
        role: str,
        rank: int | None = None,
        addresses: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._path = None if status_file is None else facts_path(status_file, rank)
        self._process = "" if status_file is None else status_file.stem
        self._environ = environ
        self._role = role
        self._rank = rank
        self._addresses = tuple(addresses)
        self._advertised = ""

    def write(self, moment: Moment, advertised: str | None = None) -> None:
        """Replace the file. ``advertised`` is kept from the last time where it is not given."""
        if advertised is not None:
            self._advertised = advertised
        if self._path is None:
            return
        facts = collect(
            self._process,
            self._environ,
            role=self._role,
            rank=self._rank,
            moment=moment,
            addresses=self._addresses,
            advertised=self._advertised,
        )
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_bytes(msgspec.json.encode(facts))
            draft.replace(self._path)


def facts_path(status_file: Path, rank: int | None) -> Path:
    """Return where the process with that status file keeps its facts."""
    folder = status_file.parent
    root = folder.parent if folder.name == "status" else folder
    number = "" if rank is None else f".{rank}"
    return root / "facts" / f"{status_file.stem}{number}.json"


def read_facts(folder: Path) -> list[Facts]:
    """Return the facts of all processes of a run, in order of names and ranks; unreadable ones not."""
    found = []
    try:
        paths = sorted(folder.glob("*.json"))
    except OSError:
        return []
    for path in paths:
        with suppress(OSError, msgspec.DecodeError):
            found.append(msgspec.json.decode(path.read_bytes(), type=Facts))
    return in_order(found)


def in_order(facts: Sequence[Facts]) -> list[Facts]:
    """Return facts in order of processes and ranks, numbers as numbers."""

    def key(one: Facts) -> tuple[list[tuple[int, str]], int]:
        parts = re.split(r"(\d+)", one.process)
        return [(int(part), "") if part.isdigit() else (-1, part) for part in parts], one.rank or 0

    return sorted(facts, key=key)


def collect(
    process: str,
    environ: Mapping[str, str],
    *,
    role: str = "",
    rank: int | None = None,
    moment: Moment = "start",
    addresses: Sequence[tuple[str, str]] = (),
    advertised: str = "",
) -> Facts:
    """Return the facts of this process. ``addresses`` are (interface, address) of this host."""
    names = {name for name in environ if matters(name)}
    shm_bytes, shm_free = shm_size()
    return Facts(
        process=process,
        rank=rank,
        role=role,
        moment=moment,
        written_at_s=time.time(),
        host=socket.gethostname(),
        boot_id=_line(Path("/proc/sys/kernel/random/boot_id")),
        pid=os.getpid(),
        python=f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})",
        kernel=os.uname().release,
        num_cpus=len(os.sched_getaffinity(0)),
        environment=Redactor(secret_values(environ)).variables(environ, names),
        other_variables=tuple(sorted(set(environ) - names)),
        libraries=libraries_of(os.getpid()),
        packages=package_versions(),
        nics=nics_of(addresses),
        advertised=advertised,
        nic=next((name for name, address in addresses if address == advertised), ""),
        rdma_devices=_rdma_devices(),
        gpus=tuple(sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))),
        limits={name: _limit(number) for name, number in _LIMITS.items()},
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free,
    )


def matters(name: str) -> bool:
    """Return whether a variable's value is worth keeping."""
    if name.startswith(_OURS):
        return False
    return bool(_FAMILIES.match(name)) and not _OF_A_STARTER.match(name)


def libraries_of(pid: int) -> tuple[Library, ...]:
    """Return the libraries that count among those mapped into a process, sorted; () where unreadable."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return libraries_in(maps)


def libraries_in(maps: str) -> tuple[Library, ...]:
    """Return the libraries that count in the text of a ``maps`` file."""
    paths = {line[line.index("/") :] for line in maps.splitlines() if ".so" in line and "/" in line}
    found = []
    for path in sorted(paths):
        if match := _LIBRARY.search(path):
            # The file that a link stands for carries the version.
            version = _VERSION.search(path) or _VERSION.search(os.path.realpath(path))
            name = "mpi4py.MPI" if match[1].startswith("MPI.") else match[1]
            found.append(Library(name, path, version[1] if version else ""))
    return tuple(sorted(found, key=lambda one: (one.name, one.path)))


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that matter and are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def nics_of(addresses: Sequence[tuple[str, str]]) -> tuple[Nic, ...]:
    """Return the network interfaces of this host but for loopback."""
    try:
        names = sorted(path.name for path in _NETS.iterdir() if path.name != "lo")
    except OSError:
        names = sorted({name for name, _ in addresses if name != "lo"})
    return tuple(
        Nic(
            name,
            tuple(address for interface, address in addresses if interface == name),
            _line(_NETS / name / "operstate"),
            _number(_NETS / name / "mtu"),
            max(0, _number(_NETS / name / "speed")),
        )
        for name in names
    )


def shm_size(folder: Path = _SHM) -> tuple[int, int]:
    """Return the size of /dev/shm and what is free of it, in bytes; zeros when it is not there."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return 0, 0
    return stat.f_frsize * stat.f_blocks, stat.f_frsize * stat.f_bavail


def _rdma_devices() -> tuple[str, ...]:
    """Return the RDMA ports as UCX_NET_DEVICES names them, with their state: ``mlx5_0:1 ACTIVE``."""
    found = []
    with suppress(OSError):
        for device in sorted(_RDMA.iterdir()):
            for port in sorted((device / "ports").iterdir()):
                state = _line(port / "state").rpartition(" ")[2]
                found.append(f"{device.name}:{port.name} {state}".strip())
    return tuple(found)


def _limit(number: int) -> Limit:
    soft, hard = resource.getrlimit(number)
    return Limit(*(-1 if one == resource.RLIM_INFINITY else one for one in (soft, hard)))


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # an interface that is down refuses to tell its speed
        return ""


def _number(path: Path) -> int:
    text = _line(path)
    return int(text) if text.lstrip("-").isdigit() else 0

"""Doctor's questions about the host's limits, and about what dead runs left on it. Changes nothing."""

from __future__ import annotations

import resource
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from trtllm_workers.deploy.findings import Finding, note, ok
from trtllm_workers.deploy.garbage import collect_garbage

_GIB = 1 << 30
_FEWEST_FILES = 4096
_FEWEST_PROCESSES = 4096
_FEWEST_PORTS = 4096
_LEAST_SHM_BYTES = 64 << 20
_LEAST_MEMLOCK_BYTES = _GIB
_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RDMA = Path("/sys/class/infiniband")


def limit_findings(known: Collection[str] = ()) -> list[Finding]:
    """Return a finding for each limit; subjects that are ``known`` were judged by somebody else."""
    found = [shared_memory(), open_files(), memlock(), processes(), free_ports()]
    return [one for one in found if one.subject not in known]


def shared_memory(folder: str = "/dev/shm") -> Finding:
    """Say how large /dev/shm is, and what is free of it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return note(
            "/dev/shm", "not there; MPI, NCCL and torch share memory in it", "mount it: tmpfs"
        )
    text = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.free < _LEAST_SHM_BYTES:
        fix = "docker run --shm-size=16g …"
        if usage.total >= _LEAST_SHM_BYTES:
            fix = "trtllm-launch gc, and see who fills it: ls -l /dev/shm"
        return note("/dev/shm", f"{text}; torch and MPI use it", fix)
    return ok("/dev/shm", text)


def open_files() -> Finding:
    """Say how many files a process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FEWEST_FILES:
        fix = f"ulimit -n {min(65536, hard) if hard >= 0 else 65536}"
        return note("open files", f"limit {soft}: about {soft // 2} clients at once", fix)
    return ok("open files", f"limit {_shown(soft)}")


def memlock() -> Finding:
    """Say how much memory may be locked: RDMA locks the whole KV pool."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"limit {_shown(soft, 'MiB', 20)}"
    if 0 <= soft < _LEAST_MEMLOCK_BYTES and _has_rdma():
        fix = "ulimit -l unlimited; docker run --ulimit memlock=-1 …"
        return note("memlock", f"{text}; RDMA must lock the whole KV pool", fix)
    return ok("memlock", text if _has_rdma() else f"{text}; there is no RDMA device to need it")


def processes() -> Finding:
    """Say how many processes and threads this user may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if 0 <= soft < _FEWEST_PROCESSES:
        return note("processes", f"limit {soft}; threads count, too", "ulimit -u 65536")
    return ok("processes", f"limit {_shown(soft)}")


def free_ports() -> Finding:
    """Say how many ports the system has for connections and for parts that take a free one."""
    try:
        first, last = (int(part) for part in _PORT_RANGE.read_text().split())
    except (OSError, ValueError):
        return note("free ports", "the system does not tell its range")
    text = f"{last - first + 1} ({first} to {last})"
    if last - first < _FEWEST_PORTS:
        fix = "sysctl net.ipv4.ip_local_port_range='32768 60999'"
        return note("free ports", f"{text}: few for many clients and workers", fix)
    return ok("free ports", text)


def left_overs(roots: Sequence[Path]) -> Finding:
    """Say what dead runs left that 'gc' would clear."""
    found = collect_garbage(roots, dry_run=True).removed
    if not found:
        return ok("left-overs", "dead runs have left nothing")
    counts = Counter(one.kind for one in found)
    words = {"memory": "names in /dev/shm", "process": "processes", "folder": "run folders"}
    shown = ", ".join(f"{number} {words.get(kind, f'{kind}s')}" for kind, number in counts.items())
    runs = ", ".join(sorted({one.run_id for one in found}))
    return note("left-overs", f"of dead runs ({runs}): {shown}", "trtllm-launch gc")


def _has_rdma() -> bool:
    try:
        return any(_RDMA.iterdir())
    except OSError:
        return False


def _shown(limit: int, unit: str = "", shift: int = 0) -> str:
    return "none" if limit < 0 else f"{limit >> shift} {unit}".strip()

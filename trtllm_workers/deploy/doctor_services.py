"""Doctor's questions about what a deployment may lean on: etcd, NATS, SLURM. Starts and changes nothing."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from urllib.parse import urlsplit

from trtllm_workers.config.outside import parse_nats
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.ask import ask
from trtllm_workers.deploy.findings import Finding, note, ok, problem
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.discovery import etcd_url

_REACH_TIMEOUT_S = 2.0
_SLURM_TIMEOUT_S = 10.0
_SLURM_PROGRAMS = ("srun", "sbatch")
# What a worker of several ranks is started with.
_MPI_TYPE = "pmix"


def service_findings(settings: Settings | None, environ: Mapping[str, str]) -> list[Finding]:
    """Return a finding for each service; only what the settings ask for can be a problem."""
    return [_etcd(settings), _nats(settings), *_slurm(environ)]


def _etcd(settings: Settings | None) -> Finding:
    lacks = _lacks(("aetcd",), ("etcd",))
    url = etcd_url(settings.discovery) if settings is not None and settings.discovery else None
    if url is None:
        if lacks:
            fix = "apt-get install etcd-server && pip install 'trtllm-launch[etcd]'"
            return note("etcd", f"optional, missing: {', '.join(lacks)}; for several hosts", fix)
        return ok("etcd", "client and server are here, and the settings ask for none")
    if "aetcd" in lacks:
        return problem(
            "etcd", "missing: aetcd; discovery is on etcd", "pip install 'trtllm-launch[etcd]'"
        )
    return _reached("etcd", url.endpoints, "is it running? ETCD_ENDPOINTS names another one")


def _nats(settings: Settings | None) -> Finding:
    lacks = _lacks(("nats",), ("nats-server",))
    fix = "pip install 'trtllm-launch[nats]'"
    needed = (
        settings is not None and settings.disaggregated and settings.prefill_dispatch == "queue"
    )
    if settings is None or not needed:
        if lacks:
            return note(
                "NATS", f"optional, missing: {', '.join(lacks)}; for the prefill queue", fix
            )
        return ok("NATS", "client and server are here, and the settings ask for none")
    if settings.nats_server is None:
        if lacks:
            return problem("NATS", f"missing: {', '.join(lacks)}; for the prefill queue", fix)
        return ok("NATS", "client and server are here; 'up' starts a server")
    if "nats" in lacks:
        return problem("NATS", "missing: nats-py; for the prefill queue", fix)
    try:
        parts = [urlsplit(one) for one in parse_nats(settings.nats_server)]
    except ConfigError as wrong:
        return problem("NATS", str(wrong))
    places = [(one.hostname or "", one.port or 0) for one in parts]
    return _reached("NATS", places, "is it running? NATS_SERVER names another one")


def _slurm(environ: Mapping[str, str]) -> list[Finding]:
    path = environ.get("PATH", "")
    programs = {name: which(name, path=path) for name in _SLURM_PROGRAMS}
    lacks = [name for name, program in programs.items() if program is None]
    job = environ.get("SLURM_JOB_ID", "")
    inside = _allocation(environ)
    srun = programs["srun"]
    if srun is None:
        text = f"missing: {', '.join(lacks)}; {'inside ' + inside if job else 'for several nodes'}"
        fix = "run it on a login node, or: module load slurm"
        if job:
            fix = "inside a container: mount SLURM's programs and /etc/slurm, or start it by srun outside"
        return [note("SLURM", text, fix)]
    said = ask([srun, "--version"], _SLURM_TIMEOUT_S)
    if isinstance(said, str):
        return [note("SLURM", f"srun fails: {said}", "ask the cluster's operators; see: sinfo")]
    version = said[0].strip() or "srun of unknown version"
    found = [ok("SLURM", f"{version}, {inside or 'outside an allocation'}")]
    if lacks:
        found[0] = note("SLURM", f"{version}, missing: {', '.join(lacks)}", "module load slurm")
    return [*found, _mpi_types(srun)]


def _mpi_types(srun: str) -> Finding:
    """Say which ways srun offers to start MPI ranks; it lists them on either stream."""
    said = ask(["sh", "-c", '"$0" --mpi=list 2>&1', srun], _SLURM_TIMEOUT_S)
    if isinstance(said, str):
        return note("SLURM MPI", f"srun --mpi=list fails: {said}", "srun --mpi=list")
    types = sorted(set(re.findall(r"\b(pmix(?:_v\d+)?|pmi2|cray_shasta|openmpi|none)\b", said[0])))
    text = f"srun offers {', '.join(types) or 'none'}"
    if not any(one.startswith(_MPI_TYPE) for one in types):
        fix = "ask for SLURM with PMIx, or take --mpi-launch mpirun (one node) or --mpi-cmd"
        return note("SLURM MPI", f"{text}; ranks on several nodes need {_MPI_TYPE}", fix)
    return ok("SLURM MPI", text)


def _allocation(environ: Mapping[str, str]) -> str:
    """Return in words which allocation this is in; "" outside one."""
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        return ""
    nodes = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "?"
    return f"allocation {job} of {nodes} node{'' if nodes == '1' else 's'}"


def _reached(subject: str, places: Sequence[tuple[str, int]], fix: str) -> Finding:
    """Say whether somebody listens at one of these places; only a connection is made."""
    faults = []
    for host, port in places:
        try:
            with socket.create_connection((host, port), _REACH_TIMEOUT_S):
                return ok(subject, f"{host}:{port} can be reached")
        except OSError as wrong:
            faults.append(f"{host}:{port}: {wrong.strerror or wrong}")
    return problem(subject, f"not to be reached: {'; '.join(faults)}", fix)


def _lacks(modules: Sequence[str], programs: Sequence[str]) -> list[str]:
    lacks = [one for one in modules if find_spec(one) is None]
    # Wheels bring programs into the environment's folder, which need not be on PATH.
    beside = Path(sys.executable).parent
    return lacks + [one for one in programs if not (beside / one).exists() and which(one) is None]

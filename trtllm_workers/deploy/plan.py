"""Which process runs with what command: pure, from settings and what this host has. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.commands import ingress_argv, worker_argv
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.types import Role

# Every process: lines appear when they are written, and a crash in native code leaves its stack.
_PYTHON_ENV = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the planner may use of this host.

    ``gpus`` are the visible devices by the names CUDA_VISIBLE_DEVICES takes. ``preset`` holds those
    variables of the environment that the planner would otherwise set.
    """

    python: str
    cwd: Path
    num_cpus: int = 1
    gpus: tuple[str, ...] = ()
    preset: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """One process to start. ``env`` goes on top of the launcher's own environment."""

    name: str
    role: str
    argv: tuple[str, ...]
    cwd: Path
    log: Path
    status: Path
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """One run on this host. ``notes`` are for the operator's eyes."""

    run_id: str
    folder: RunFolder
    processes: tuple[PlannedProcess, ...]
    model: str
    http_host: str
    http_port: int
    discovery: str
    log_dir: Path
    keeps_logs: bool
    start_timeout_s: float
    drain_timeout_s: float
    notes: tuple[str, ...] = ()


def make_plan(settings: Settings, inventory: Inventory, folder: RunFolder) -> Plan:
    """Return the plan of an aggregated deployment: one ingress and ``num_workers`` workers."""
    log_dir = settings.log_dir.absolute() if settings.log_dir else folder.logs
    discovery = settings.discovery or folder.discovery.as_uri()
    # In a directory that several runs share, two workers of one name would replace each other.
    prefix = f"{folder.run_id}-" if settings.discovery else ""

    def process(name: str, role: str, argv: list[str], env: Mapping[str, str]) -> PlannedProcess:
        # A log folder that outlives runs gets one set of files per run.
        log_name = f"{folder.run_id}-{name}.log" if settings.log_dir else f"{name}.log"
        status = folder.status(name)
        return PlannedProcess(
            name=name,
            role=role,
            argv=(inventory.python, *argv, "--status-file", str(status)),
            cwd=inventory.cwd,
            log=log_dir / log_name,
            status=status,
            env={**_PYTHON_ENV, **env},
        )

    shares, notes = _shares(settings, inventory)
    workers = [
        process(
            f"worker-{index}",
            str(Role.AGGREGATED),
            worker_argv(settings, f"{prefix}worker-{index}", discovery),
            share,
        )
        for index, share in enumerate(shares)
    ]
    ingress = process("ingress", "ingress", ingress_argv(settings, discovery), {})
    return Plan(
        run_id=folder.run_id,
        folder=folder,
        # Workers first: they take longest.
        processes=(*workers, ingress),
        model=settings.served_model_name,
        http_host=settings.http_host,
        http_port=settings.http_port,
        discovery=discovery,
        log_dir=log_dir,
        keeps_logs=settings.log_dir is not None,
        start_timeout_s=settings.start_timeout_s,
        drain_timeout_s=settings.drain_timeout_s,
        notes=notes,
    )


def _shares(
    settings: Settings, inventory: Inventory
) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Return each worker's share of the host as variables: threads on a CPU, one GPU each."""
    num_workers = settings.num_workers
    if num_workers == 1 or settings.engine == "sim":
        return [{} for _ in range(num_workers)], ()
    if inventory.gpus and "CUDA_VISIBLE_DEVICES" not in inventory.preset:
        if len(inventory.gpus) >= num_workers:
            return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in inventory.gpus[:num_workers]], ()
        note = f"{num_workers} workers share {len(inventory.gpus)} GPUs: each must leave memory to the others"
        count = len(inventory.gpus)
        return [
            {"CUDA_VISIBLE_DEVICES": inventory.gpus[index % count]} for index in range(num_workers)
        ], (note,)
    if "OMP_NUM_THREADS" in inventory.preset:
        return [{} for _ in range(num_workers)], ()
    threads = str(max(1, inventory.num_cpus // num_workers))
    return [{"OMP_NUM_THREADS": threads} for _ in range(num_workers)], ()

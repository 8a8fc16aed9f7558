"""Flags and variables to a plan of a job: everything that can be found wrong before anything is asked of SLURM."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_workers.config.env import environment, read_text
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings
from trtllm_workers.config.slurm_options import SLURM_OPTIONS, SlurmSettings, resolve_slurm
from trtllm_workers.deploy.ask import ask
from trtllm_workers.deploy.etcd import etcd_password
from trtllm_workers.deploy.inventory import find_mpirun, mpi_flavour, mpiexec_path
from trtllm_workers.deploy.prepare import prepare
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.deploy.slurm import answers
from trtllm_workers.deploy.slurm.command import run_command
from trtllm_workers.deploy.slurm.hostlist import expand
from trtllm_workers.deploy.slurm.layout import Layout, lay_out
from trtllm_workers.deploy.slurm.picks import MpiNeeds, pick_mpi
from trtllm_workers.deploy.slurm.plan import Allocation, SlurmPlan, make_slurm_plan
from trtllm_workers.deploy.slurm.steps import unset_for_srun
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

_SLURM_NAMES = frozenset(option.name for option in SLURM_OPTIONS)
_LAUNCH_NAMES = frozenset(option.name for option in LAUNCH_OPTIONS)
_ENGINE_SAID_BY = ("IMAGE", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE")
_MPI_LIST_TIMEOUT_S = 10.0
_CHECKOUT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """Checked settings of a job, and the shape that follows from them."""

    settings: Settings
    slurm: SlurmSettings
    configs: Mapping[Role, EngineConfig]
    layout: Layout
    notes: tuple[str, ...] = ()


def prepare_job(given: Mapping[str, Any], environ: Mapping[str, str]) -> PreparedJob:
    """Return settings and shape of a job. Raises ConfigError naming what is wrong."""
    slurm = resolve_slurm({name: given[name] for name in _SLURM_NAMES & set(given)}, environ)
    explicit = {
        name: value
        for name, value in given.items()
        if name in _LAUNCH_NAMES and value is not None and value != ()
    }
    prepared = prepare(explicit | _engine(explicit, environ, slurm), environ)
    _require_no_encoders(prepared.settings)
    layout = lay_out(prepared.settings, slurm, prepared.engine_configs)
    warnings = _only_of_jobs(prepared.settings.warnings)
    return PreparedJob(
        prepared.settings,
        slurm,
        prepared.engine_configs,
        layout,
        (*warnings, *slurm.warnings, *prepared.notes),
    )


def _engine(
    explicit: Mapping[str, Any], environ: Mapping[str, str], slurm: SlurmSettings
) -> dict[str, str]:
    """Return what ``auto`` stands for: the nodes have GPUs although this host may have none.

    The head of a cluster seldom has TensorRT-LLM; taking torch there would serve from CPUs in silence.
    """
    asked = explicit.get("engine") or environ.get("ENGINE", "").strip()
    if asked and str(asked).casefold() != "auto":
        return {}
    variables = next(option.env for option in LAUNCH_OPTIONS if option.name == "gpus_per_node")
    gpus = explicit.get("gpus_per_node") or read_text(variables, environ)
    if slurm.image or gpus or any(environ.get(name) for name in _ENGINE_SAID_BY):
        return {"engine": "trtllm"}
    return {}


def _require_no_encoders(settings: Settings) -> None:
    if settings.num_encode_workers:
        raise ConfigError(
            f"{settings.sources['num_encode_workers']}: a job on SLURM starts no encode workers; without them "
            "prefill workers encode images themselves, or aggregated ones",
            param="num_encode_workers",
        )


def _only_of_jobs(warnings: tuple[str, ...]) -> tuple[str, ...]:
    """Return the warnings without those about variables that only a job has."""
    ours = {name for option in SLURM_OPTIONS for name in option.env}
    return tuple(one for one in warnings if not any(f" {name} " in one for name in ours))


def allocation_of(environ: Mapping[str, str]) -> Allocation | None:
    """Return the allocation that this process is in; None outside."""
    job_id = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID") or ""
    nodes = environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST") or ""
    if not job_id:
        return None
    if not nodes:
        raise ConfigError(
            f"SLURM_JOB_ID is {job_id}, but SLURM_JOB_NODELIST is not set; start this inside salloc or a job, "
            "or unset SLURM_JOB_ID to submit one",
            param="num_nodes",
        )
    return Allocation(tuple(expand(nodes)), job_id)


def imagined(layout: Layout) -> Allocation:
    """Return nodes with names that stand for those that SLURM would give."""
    return Allocation(tuple(f"node{index}" for index in range(1, layout.num_nodes + 1)))


async def mpi_type(job: PreparedJob) -> str:
    """Return srun's --mpi for the workers. Asks srun only when ranks need one. Raises ConfigError."""
    asked = None if job.slurm.mpi == "auto" else job.slurm.mpi
    needs = _library(job)
    if not needs:
        return asked or "none"
    said = await run_command(["srun", "--mpi=list"], timeout_s=_MPI_LIST_TIMEOUT_S)
    return pick_mpi(answers.mpi_types(said.stdout, said.stderr), asked, needs)


def likely_mpi_type(job: PreparedJob) -> str:
    """Return srun's --mpi as a cluster that offers everything would have it; asks nobody."""
    if job.slurm.mpi != "auto":
        return job.slurm.mpi
    return {"": "none", "mpich": "pmi2", "openmpi": "pmix"}[_library(job)]


def _library(job: PreparedJob) -> MpiNeeds:
    """Return whose MPI library the ranks use; "" when none needs MPI."""
    if job.settings.engine == "trtllm":
        # Its own images have Open MPI; on the nodes it is what mpirun is of.
        flavour = "" if job.slurm.image else find_mpirun(environment())[1]
        return "mpich" if flavour == "mpich" else "openmpi"
    if not job.layout.any_world:
        return ""
    if job.slurm.image or not mpiexec_path():
        return "mpich"
    said = ask([mpiexec_path(), "--version"], _MPI_LIST_TIMEOUT_S)
    return "openmpi" if isinstance(said, tuple) and mpi_flavour(said[0]) == "openmpi" else "mpich"


def secrets_of(job: PreparedJob, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a job's own etcd: a secret to make its password from, and that password."""
    if job.slurm.services != "etcd" or job.settings.discovery:
        return {}
    secret = environ.get("CLUSTER_SECRET", "").strip() or secrets.token_hex(32)
    return {"CLUSTER_SECRET": secret, "ETCD_PASSWORD": etcd_password(secret.encode())}


def plan_job(
    job: PreparedJob,
    allocation: Allocation,
    folder: RunFolder,
    *,
    mpi: str,
    environ: Mapping[str, str] | None = None,
) -> SlurmPlan:
    """Return the plan of a job on these nodes. Raises ConfigError."""
    return make_slurm_plan(
        job.settings,
        job.slurm,
        job.configs,
        job.layout,
        allocation,
        folder,
        python=sys.executable,
        cwd=Path.cwd(),
        checkout=_CHECKOUT,
        mpi=mpi,
        unset=unset_for_srun(environ or {}),
    )

"""A job on SLURM as a plan: one srun for each part, and what each of its ranks executes. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.config.slurm_options import SlurmSettings
from trtllm_workers.deploy.commands import etcd_argv, ingress_argv, nats_argv, worker_argv
from trtllm_workers.deploy.etcd import USER as ETCD_USER
from trtllm_workers.deploy.etcd import etcd_folder
from trtllm_workers.deploy.mpi import LLMAPI_LAUNCH
from trtllm_workers.deploy.names import ETCD, NATS, SERVICES
from trtllm_workers.deploy.plan import Plan, PlannedProcess
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.deploy.shares import Crew, Share
from trtllm_workers.deploy.shm import EPLB_SHM_NAME, shm_name
from trtllm_workers.deploy.slurm.layout import CrewShape, Layout, give_nodes
from trtllm_workers.deploy.slurm.records import Part, TaskSpec
from trtllm_workers.deploy.slurm.steps import Container, Step, mounts_of, split_words, srun_words
from trtllm_workers.deploy.slurm.task import ADDRESS, ETCD_URL
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

_TASK = "trtllm_workers.deploy.slurm.task"
_PREFLIGHT = "trtllm_workers.deploy.slurm.preflight"
_EVERY_ADDRESS = "0.0.0.0"
_PYTHON_ENV = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes of a SLURM job. ``job_id`` "": there is no job yet, and the names stand for some."""

    nodes: tuple[str, ...]
    job_id: str = ""

    @property
    def head(self) -> str:
        """The node of the ingress and the services."""
        return self.nodes[0]


@dataclass(frozen=True, slots=True)
class SlurmPlan:
    """A plan whose processes are sruns; ``specs`` are what their tasks execute, by name.

    ``preflight`` is the srun that looks at every node first, ``clear`` the one that clears them in the
    end; ``forget`` removes the unpacked image there, () without one.
    """

    plan: Plan
    layout: Layout
    allocation: Allocation
    specs: Mapping[str, TaskSpec]
    preflight: tuple[str, ...]
    clear: tuple[str, ...]
    forget: tuple[str, ...]
    parts: tuple[Part, ...]
    container: Container
    settings: Settings
    slurm: SlurmSettings
    files: Mapping[str, str] = field(default_factory=dict)


def make_slurm_plan(
    settings: Settings,
    slurm: SlurmSettings,
    configs: Mapping[Role, EngineConfig],
    layout: Layout,
    allocation: Allocation,
    folder: RunFolder,
    *,
    python: str,
    cwd: Path,
    checkout: Path,
    mpi: str = "pmix",
    unset: frozenset[str] = frozenset(),
) -> SlurmPlan:
    """Return the plan. ``python`` and ``checkout`` are the launcher's own; ``mpi`` is srun's;
    ``unset`` names variables that would change what the sruns mean.

    Raises ConfigError when the allocation is too small or a value cannot be passed on.
    """
    if mpi == "none" and layout.any_world:
        worlds = [crew for crew in layout.crews if crew.num_ranks > 1]
        raise ConfigError(
            f"{worlds[0].role} workers are MPI worlds ({worlds[0].in_words}), and with --mpi none each rank "
            "would be a world of its own; take pmix or pmi2, as the cluster offers (srun --mpi=list)",
            param="mpi",
        )
    nodes_of = give_nodes(layout, allocation.nodes)
    settings = _for_other_hosts(settings, slurm)
    files = _needed_files(settings, configs)
    discovery = _discovery(settings, slurm, folder)
    container = _container(slurm, folder, checkout, files, allocation)
    inside = (slurm.image_python or "python3") if slurm.image else python
    more = split_words(slurm.srun_args, "--srun-args")
    log_dir = settings.log_dir.absolute() if settings.log_dir else folder.logs
    specs: dict[str, TaskSpec] = {}
    parts: list[Part] = []
    prefix = f"{folder.run_id}-" if settings.discovery else ""

    def process(
        name: str,
        role: str,
        nodes: tuple[str, ...],
        words: Sequence[str],
        *,
        ranks_per_node: int = 1,
        env: Mapping[str, str] | None = None,
        in_world: bool = False,
        launcher: str = "",
    ) -> PlannedProcess:
        num_ranks = len(nodes) * ranks_per_node
        log_name = f"{folder.run_id}-{name}.log" if settings.log_dir else f"{name}.log"
        log, status = log_dir / log_name, folder.status(name)
        specs[name] = TaskSpec(
            run_id=folder.run_id,
            name=name,
            argv=(*words, "--status-file", str(status)),
            env={**_PYTHON_ENV, **(env or {})},
            cwd=str(cwd),
            status=str(status),
            log=str(log),
            num_ranks=num_ranks,
            interface=(slurm.head_node_ip if role in SERVICES else None) or slurm.interface,
            etcd_status=str(folder.status(ETCD)) if ETCD_URL in words else "",
            wait_s=settings.start_timeout_s,
            launcher=launcher,
        )
        parts.append(Part(name, role, nodes, ranks_per_node))
        step = Step(name, nodes, ranks_per_node, mpi if in_world else "none")
        return PlannedProcess(
            name=name,
            role=role,
            argv=srun_words(
                step,
                (inside, "-P", "-m", _TASK, str(folder.path), name),
                run_id=folder.run_id,
                container=container,
                more=more,
            ),
            cwd=cwd,
            log=log,
            status=status,
            unset=unset,
            is_world=True,
            labelled=num_ranks > 1,
            nodes=nodes,
            ranks_per_node=ranks_per_node,
        )

    own_nats = settings.disaggregated and settings.prefill_dispatch == "queue"
    own_nats = own_nats and settings.nats_server is None
    services = []
    head = (allocation.head,)
    if slurm.services == "etcd" and not settings.discovery:
        etcd = etcd_argv(settings, etcd_folder(folder.run_id), ADDRESS)
        services.append(process(ETCD, ETCD, head, (inside, *etcd)))
    if own_nats:
        nats = nats_argv(settings, discovery, folder.path / NATS)
        services.append(process(NATS, NATS, head, (inside, *nats, "--host", ADDRESS)))
    workers = []
    # Under srun that is so for a single rank as well: nothing may be spawned there.
    launcher = LLMAPI_LAUNCH if settings.engine == "trtllm" else ""
    for crew in layout.crews:
        as_crew = _crew(crew, settings)
        for name in crew.worker_names():
            words = worker_argv(
                settings,
                as_crew,
                Share(),
                f"{prefix}{name}",
                discovery,
                folder.status(NATS) if own_nats else None,
            )
            words += ["--advertise-host", ADDRESS]
            told = configs[crew.role].settings.get("gpus_per_node")
            if launcher and (told is None or told.value is None):
                # Rank modulo this is a rank's device; by itself TensorRT-LLM counts those of rank 0's node.
                words += ["--set", f"gpus_per_node={crew.ranks_per_node}"]
            env = {EPLB_SHM_NAME: shm_name(folder.run_id, name)}
            workers.append(
                process(
                    name,
                    str(crew.role),
                    nodes_of[name],
                    (inside, *words),
                    ranks_per_node=crew.ranks_per_node,
                    env=env,
                    in_world=crew.num_ranks > 1 or settings.engine == "trtllm",
                    launcher=launcher,
                )
            )
    ingress = process(
        "ingress",
        "ingress",
        head,
        (inside, *ingress_argv(settings, discovery), "--advertise-host", ADDRESS),
    )
    job_nodes = allocation.nodes[: max(layout.num_nodes, 1)]
    plan = Plan(
        run_id=folder.run_id,
        folder=folder,
        processes=(*services, *workers, ingress),
        model=settings.served_model_name,
        http_host=settings.http_host,
        http_port=settings.http_port,
        discovery=discovery,
        log_dir=log_dir,
        keeps_logs=settings.log_dir is not None,
        start_timeout_s=settings.start_timeout_s,
        drain_timeout_s=settings.drain_timeout_s,
        notes=(*layout.notes, *_notes(settings, slurm, layout, allocation)),
        max_restarts=settings.max_restarts,
        settings=settings,
        engine_configs=configs,
    )

    def every_node(name: str, module: str, words: Sequence[str], *, first: bool) -> tuple[str, ...]:
        return srun_words(
            Step(name, job_nodes),
            (inside, "-P", "-m", module, str(folder.path), *words),
            run_id=folder.run_id,
            container=container,
            more=more,
            first=first,
        )

    return SlurmPlan(
        plan=plan,
        layout=layout,
        allocation=dataclasses.replace(allocation, nodes=job_nodes),
        specs=specs,
        preflight=every_node("preflight", _PREFLIGHT, (), first=True),
        clear=every_node("clear", _TASK, ("--clear",), first=False),
        forget=_forget(container, allocation, job_nodes, folder.run_id, more),
        parts=tuple(parts),
        container=container,
        settings=settings,
        slurm=slurm,
        files=files,
    )


def _forget(
    container: Container,
    allocation: Allocation,
    nodes: tuple[str, ...],
    run_id: str,
    more: Sequence[str],
) -> tuple[str, ...]:
    """Return the srun that removes the unpacked image; pyxis leaves that to whoever named it.

    Where it keeps names per job the name has the job's id in front. Without enroot there is nothing to do.
    """
    if not container.image:
        return ()
    names = (f"pyxis_{container.name}", f"pyxis_{allocation.job_id}_{container.name}")
    script = 'command -v enroot >/dev/null && enroot remove -f "$@" 2>/dev/null; true'
    return srun_words(
        Step("forget", nodes), ("sh", "-c", script, "sh", *names), run_id=run_id, more=more
    )


def _for_other_hosts(settings: Settings, slurm: SlurmSettings) -> Settings:
    """Return settings whose processes reach each other between nodes.

    A job's ingress is there for other hosts too; only who says so gets one on loopback.
    """
    why = "a job's processes are on several hosts"
    sources = {**settings.sources, "plane_host": why}
    settings = dataclasses.replace(settings, plane_host=_EVERY_ADDRESS, sources=sources)
    if settings.sources["http_host"] == "default":
        sources = {**sources, "http_host": why}
        settings = dataclasses.replace(settings, http_host=_EVERY_ADDRESS, sources=sources)
    if slurm.services == "etcd" and not settings.discovery:
        sources = {**sources, "etcd_username": "the job's own etcd"}
        settings = dataclasses.replace(settings, etcd_username=ETCD_USER, sources=sources)
    return settings


def _discovery(settings: Settings, slurm: SlurmSettings, folder: RunFolder) -> str:
    if settings.discovery:
        return settings.discovery
    return ETCD_URL if slurm.services == "etcd" else folder.discovery.as_uri()


def _container(
    slurm: SlurmSettings,
    folder: RunFolder,
    checkout: Path,
    files: Mapping[str, str],
    allocation: Allocation,
) -> Container:
    if not slurm.image:
        return Container()
    needed = [str(folder.path.parent), *(str(Path(path)) for path in files)]
    asked = f"{checkout}:/mnt" if slurm.mounts is None else slurm.mounts
    return Container(
        image=slurm.image,
        mounts=mounts_of(asked, needed),
        name=f"trtllm-launch-{allocation.job_id or folder.run_id}",
    )


def _needed_files(settings: Settings, configs: Mapping[Role, EngineConfig]) -> dict[str, str]:
    """Return what every node must see, by what it is."""
    found = {str(settings.model_path.absolute()): "MODEL_PATH"}
    for name, folder in settings.lora:
        found[str(folder.absolute())] = f"the LoRA adapter {name}"
    for option, role in (
        ("engine_config", Role.AGGREGATED),
        ("prefill_engine_config", Role.PREFILL),
        ("decode_engine_config", Role.DECODE),
    ):
        path = getattr(settings, option)
        if path is not None and role in configs:
            found.setdefault(str(path.absolute()), f"the engine config of {role} workers")
    for option in ("plane_cacert", "plane_cert", "plane_key", "sim_cost_model"):
        path = getattr(settings, option)
        if path is not None:
            found[str(path.absolute())] = option.replace("_", " ")
    return found


def _crew(shape: CrewShape, settings: Settings) -> Crew:
    """Return the crew as ``worker_argv`` knows it: an MPI rank of the torch engine starts as such."""
    ranks = shape.num_ranks if settings.engine == "torch" else 1
    return Crew(role=shape.role, num_workers=shape.num_workers, num_ranks=ranks)


def _notes(
    settings: Settings, slurm: SlurmSettings, layout: Layout, allocation: Allocation
) -> list[str]:
    notes = []
    spare = len(allocation.nodes) - layout.num_nodes
    if spare > 0 and allocation.job_id:
        notes.append(
            f"{spare} of the {len(allocation.nodes)} nodes stay idle: the workers need {layout.num_nodes}"
        )
    if settings.engine == "torch" and settings.sources.get("engine") == "default":
        notes.append("engine torch computes on CPUs; ENGINE=trtllm is for GPUs")
    if settings.discovery and slurm.services == "etcd":
        notes.append(f"--services etcd has no effect: workers register at {settings.discovery}")
    return notes

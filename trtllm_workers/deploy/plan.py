"""Which process runs with what command: pure, from settings and what this host has. Starts nothing."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trtllm_workers.config.env import environment
from trtllm_workers.config.images import MULTIMODAL
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.commands import ingress_argv, nats_argv, worker_argv
from trtllm_workers.deploy.mpi import THIS_HOST, MpiHost
from trtllm_workers.deploy.names import NATS, SERVICES, roles_of
from trtllm_workers.deploy.run import RunFolder
from trtllm_workers.deploy.shares import GPU_FRACTION, THREADS, Crew, Share, share_out
from trtllm_workers.deploy.worlds import Start, Worlds
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

# Every process: lines appear when they are written, and a crash in native code leaves its stack.
_PYTHON_ENV = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the planner may use of this host.

    ``gpus`` are the visible devices by the names CUDA_VISIBLE_DEVICES takes. ``preset`` holds
    OMP_NUM_THREADS when the environment sets it. ``mpiexec`` is the program of this environment that
    starts MPI worlds; ``mpi_lacks`` names what is missing for them. ``transports_lack`` names, by KV
    transport, the missing package that it needs; ``queue_lacks`` what the prefill queue needs: the
    client's package, and the program of a server; ``vision_lacks`` the missing packages for images.

    For engine trtllm: ``mpirun`` is its MPI library's program and ``mpi_flavour`` says whose
    ("openmpi", "mpich", "": unknown); ``in_slurm_job`` whether this is inside a SLURM allocation;
    ``host_env`` holds the launcher's variables, of which ranks get some.
    """

    python: str
    cwd: Path
    num_cpus: int = 1
    gpus: tuple[str, ...] = ()
    preset: frozenset[str] = frozenset()
    mpiexec: str = ""
    mpi_lacks: tuple[str, ...] = ("mpiexec",)
    transports_lack: Mapping[str, str] = field(default_factory=dict)
    queue_lacks: tuple[str, ...] = ()
    vision_lacks: tuple[str, ...] = ()
    mpirun: str = ""
    mpi_flavour: str = ""
    in_slurm_job: bool = False
    host_env: Mapping[str, str] = field(default_factory=environment, repr=False)
    hostname: str = field(default_factory=socket.gethostname)
    is_root: bool = field(default_factory=lambda: os.geteuid() == 0)


@dataclass(frozen=True, slots=True)
class PlannedProcess:
    """One process to start. ``env`` goes on top of the launcher's own environment.

    ``unset`` names variables of the launcher that it must not see. With ``num_ranks`` above 1 the
    command starts an MPI world of so many processes on this host; with ``term_to_leader`` only rank 0
    is asked to end, because what started the world would end all ranks at once. ``is_world``: what it
    writes about its end may name a rank, wherever the ranks are. ``labelled``: each line that it writes
    has its rank in front. ``nodes``: where its ranks are, in their order, when that is not this host.
    """

    name: str
    role: str
    argv: tuple[str, ...]
    cwd: Path
    log: Path
    status: Path
    env: Mapping[str, str] = field(default_factory=dict)
    num_ranks: int = 1
    unset: frozenset[str] = frozenset()
    term_to_leader: bool = False
    is_world: bool = False
    labelled: bool = False
    nodes: tuple[str, ...] = ()
    ranks_per_node: int = 1

    def node_of(self, rank: int) -> str:
        """Return the node of a rank; "" for one on this host."""
        at = rank // self.ranks_per_node
        return self.nodes[at] if at < len(self.nodes) else ""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run on this host. ``notes`` are for the operator's eyes.

    ``max_restarts``: how often a worker that dies after the run was ready is started again within
    10 minutes. ``settings`` and ``engine_configs`` are what it was made from, for the record.
    """

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
    max_restarts: int = 0
    settings: Settings | None = None
    engine_configs: Mapping[Role, EngineConfig] = field(default_factory=dict)

    @property
    def takes_images(self) -> bool:
        """Whether requests may have images."""
        return self.settings is not None and self.settings.modality == MULTIMODAL

    @property
    def workers_in_words(self) -> str:
        """How many workers there are: ``2 workers``, ``1 prefill worker and 2 decode workers``."""
        roles = Counter(one.role for one in self.processes if one.role not in SERVICES)
        parts = [
            f"{count}{'' if role == Role.AGGREGATED else f' {role}'} worker{'s' if count > 1 else ''}"
            for role, count in roles.items()
        ]
        return " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])


def make_plan(
    settings: Settings,
    inventory: Inventory,
    folder: RunFolder,
    engine_configs: Mapping[Role, EngineConfig] | None = None,
) -> Plan:
    """Return the plan of one ingress and the workers of every role that the settings ask for.

    ``engine_configs`` tell how many ranks a worker of a role has; without them it has one. Raises
    ConfigError when this host cannot give the workers what they need.
    """
    if settings.disaggregated and settings.engine != "trtllm":  # which moves its KV itself
        _require_transport(settings, inventory)
    if settings.modality == MULTIMODAL:
        _require_vision(settings, inventory)
    queued = settings.disaggregated and settings.prefill_dispatch == "queue"
    own_nats = queued and settings.nats_server is None
    if queued:
        _require_queue(settings, inventory, own_nats=own_nats)
    log_dir = settings.log_dir.absolute() if settings.log_dir else folder.logs
    discovery = settings.discovery or folder.discovery.as_uri()
    # In a directory that several runs share, two workers of one name would replace each other.
    prefix = f"{folder.run_id}-" if settings.discovery else ""

    def process(
        name: str, role: str, argv: list[str], env: Mapping[str, str], crew: Crew | None = None
    ) -> PlannedProcess:
        # A log folder that outlives runs gets one set of files per run.
        log_name = f"{folder.run_id}-{name}.log" if settings.log_dir else f"{name}.log"
        status = folder.status(name)
        argv = [*argv, "--status-file", str(status)]
        env = {**_PYTHON_ENV, **env}
        if crew is not None and crew.method:
            started = worlds.start(crew, name, inventory.python, argv, env)
        else:
            started = Start((*python_words(crew.num_ranks if crew else 1, inventory), *argv), env)
        return PlannedProcess(
            name=name,
            role=role,
            argv=started.argv,
            cwd=inventory.cwd,
            log=log_dir / log_name,
            status=status,
            env=started.env,
            num_ranks=crew.num_ranks if crew is not None and crew.method in ("", "mpirun") else 1,
            unset=started.unset,
            term_to_leader=started.term_to_leader,
            is_world=crew is not None and crew.num_ranks > 1 and crew.method != "spawn",
        )

    crews = _crews(settings, engine_configs or {})
    worlds = Worlds(settings, _mpi_host(settings, inventory), folder.run_id)
    if settings.engine == "trtllm":
        crews = worlds.settle(crews, engine_configs or {})
    shares, notes = _shares(settings, crews, inventory)
    if len({crew.num_ranks for crew in crews}) > 1 and settings.engine == "torch":
        sizes = " and ".join(f"{crew.num_ranks} for {crew.role}" for crew in crews)
        notes += (
            f"tensor_parallel_size is {sizes}: their sums are rounded differently, so the check of "
            "tokens may refuse the pair; with equal sizes it does not",
        )
    workers = [
        process(
            name := f"{'worker' if crew.role is Role.AGGREGATED else crew.role}-{index}",
            str(crew.role),
            worker_argv(
                settings,
                crew,
                share,
                f"{prefix}{name}",
                discovery,
                folder.status(NATS) if own_nats else None,
            ),
            share.env,
            crew,
        )
        for crew in crews
        for index, share in enumerate(shares[crew.role])
    ]
    reached_as = inventory.hostname if any(crew.method == "srun" for crew in crews) else ""
    ingress = process("ingress", "ingress", ingress_argv(settings, discovery, reached_as), {})
    nats = (
        [process(NATS, NATS, nats_argv(settings, discovery, folder.path / NATS), {})]
        if own_nats
        else []
    )
    return Plan(
        run_id=folder.run_id,
        folder=folder,
        # What others wait for, then workers: they take longest.
        processes=(*nats, *workers, ingress),
        model=settings.served_model_name,
        http_host=settings.http_host,
        http_port=settings.http_port,
        discovery=discovery,
        log_dir=log_dir,
        keeps_logs=settings.log_dir is not None,
        start_timeout_s=settings.start_timeout_s,
        drain_timeout_s=settings.drain_timeout_s,
        notes=(*notes, *worlds.notes(crews)),
        max_restarts=settings.max_restarts,
        settings=settings,
        engine_configs=dict(engine_configs or {}),
    )


def _mpi_host(settings: Settings, inventory: Inventory) -> MpiHost:
    return MpiHost(
        gpus_per_node=settings.gpus_per_node or len(inventory.gpus),
        mpirun=inventory.mpirun,
        flavour=inventory.mpi_flavour,
        in_slurm_job=inventory.in_slurm_job,
        is_root=inventory.is_root,
        environ=inventory.host_env,
    )


def _crews(settings: Settings, configs: Mapping[Role, EngineConfig]) -> list[Crew]:
    crews = (
        [] if settings.disaggregated else [_crew(Role.AGGREGATED, settings.num_workers, configs)]
    )
    return crews + [
        _crew(
            role,
            getattr(settings, f"num_{role}_workers"),
            configs,
            getattr(settings, f"{role}_cuda_visible_devices"),
            settings.sources[f"{role}_cuda_visible_devices"],
        )
        for role in roles_of(settings)
        if role is not Role.AGGREGATED
    ]


def _crew(
    role: Role,
    num_workers: int,
    configs: Mapping[Role, EngineConfig],
    told: str | None = None,
    source: str = "",
) -> Crew:
    config = configs.get(role)
    found = config.settings if config else {}
    ranks, fraction = found.get("tensor_parallel_size"), found.get(GPU_FRACTION)
    return Crew(
        role=role,
        num_workers=num_workers,
        num_ranks=int(ranks.value) if ranks else 1,
        told=tuple(told.split(",")) if told else None,
        source=source,
        # A worker that only encodes keeps no KV.
        gpu_fraction=fraction.value
        if fraction and fraction.source == "default" and role is not Role.ENCODE
        else None,
    )


def _shares(
    settings: Settings, crews: list[Crew], inventory: Inventory
) -> tuple[dict[Role, list[Share]], tuple[str, ...]]:
    if settings.engine == "sim":  # it computes nothing
        return {crew.role: [Share()] * crew.num_workers for crew in crews}, ()
    here = [crew for crew in crews if crew.method != "srun"]
    shares, notes = share_out(
        here, inventory.gpus, inventory.num_cpus, threads_are_set=THREADS in inventory.preset
    )
    # What SLURM starts takes whole nodes; SLURM names their GPUs.
    return {crew.role: shares.get(crew.role, [Share()] * crew.num_workers) for crew in crews}, notes


def _require_transport(settings: Settings, inventory: Inventory) -> None:
    name = settings.kv_transport
    if package := inventory.transports_lack.get(name):
        source = settings.sources["kv_transport"]
        raise ConfigError(
            f"KV transport {name} ({source}) needs the Python package '{package}', which is not "
            f"installed; run: pip install 'trtllm-launch[{name}]', "
            "or take what is there with --kv-transport auto",
            param="kv_transport",
        )


def _require_vision(settings: Settings, inventory: Inventory) -> None:
    lacks = inventory.vision_lacks
    if lacks:
        raise ConfigError(
            f"the model takes images, and that needs the Python package{'s' if lacks[1:] else ''} "
            f"{' and '.join(lacks)}, which this environment has not; run: "
            f"{install_vision(settings.engine, lacks)}, or serve text alone with --modality text",
            param="modality",
        )


def install_vision(engine: str, lacks: Sequence[str]) -> str:
    """Return the command that brings missing packages; beside TensorRT-LLM only those, so that torch stays."""
    if engine == "trtllm":
        return f"pip install {' '.join(lacks)}"
    return "pip install 'trtllm-launch[vision]'"


def _require_queue(settings: Settings, inventory: Inventory, *, own_nats: bool) -> None:
    lacks = [one for one in inventory.queue_lacks if own_nats or one != "nats-server"]
    if lacks:
        source = settings.sources["prefill_dispatch"]
        raise ConfigError(
            f"the prefill queue ({source}) needs {' and '.join(lacks)}, which this environment has not; "
            "run: pip install 'trtllm-launch[nats]'",
            param="prefill_dispatch",
        )


def python_words(num_ranks: int, inventory: Inventory) -> tuple[str, ...]:
    """Return how to start Python: alone, or as an MPI world of ``num_ranks`` on this host."""
    if num_ranks == 1:
        return (inventory.python,)
    if inventory.mpi_lacks:
        raise ConfigError(
            f"tensor_parallel_size {num_ranks} starts an MPI world, and this environment has no "
            f"{' and no '.join(inventory.mpi_lacks)}; run: pip install 'trtllm-launch[mpi]'",
            param="tensor_parallel_size",
        )
    return (inventory.mpiexec, *THIS_HOST, "-n", str(num_ranks), inventory.python)

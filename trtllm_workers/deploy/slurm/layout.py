"""Which worker runs on which nodes, and whether nodes × GPUs are what the engine configs ask for. Pure.

A worker takes whole nodes. The ingress and the services run on the head node, the first one, beside
the worker that has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.config.slurm_options import SlurmSettings
from trtllm_workers.deploy.mpi import World, world_of
from trtllm_workers.deploy.names import ENGINE_CONFIG_OF
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

# What Dynamo's scripts take for a node where nobody says: a GB200 has four.
DEFAULT_GPUS_PER_NODE = 4
_NODES_OF = {
    Role.AGGREGATED: "num_nodes",
    Role.PREFILL: "num_prefill_nodes",
    Role.DECODE: "num_decode_nodes",
}
_WORKERS_OF = {
    Role.AGGREGATED: "num_workers",
    Role.PREFILL: "num_prefill_workers",
    Role.DECODE: "num_decode_workers",
}


@dataclass(frozen=True, slots=True)
class CrewShape:
    """The workers of one role: each takes ``num_nodes`` nodes and runs ``ranks_per_node`` on each."""

    role: Role
    num_workers: int
    num_nodes: int
    ranks_per_node: int
    in_words: str = "tensor_parallel_size 1"

    @property
    def num_ranks(self) -> int:
        """Ranks of one worker."""
        return self.num_nodes * self.ranks_per_node

    @property
    def total_nodes(self) -> int:
        """Nodes of all workers."""
        return self.num_workers * self.num_nodes

    def worker_names(self) -> list[str]:
        """Return the names of its workers."""
        stem = "worker" if self.role is Role.AGGREGATED else str(self.role)
        return [f"{stem}-{index}" for index in range(self.num_workers)]


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a whole job. ``gpus_per_node`` 0: the engine takes none."""

    crews: tuple[CrewShape, ...]
    gpus_per_node: int = 0
    notes: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """How many nodes the job needs."""
        return sum(crew.total_nodes for crew in self.crews)

    @property
    def widest(self) -> int:
        """The most tasks that one node gets for a worker."""
        return max(crew.ranks_per_node for crew in self.crews)

    @property
    def any_world(self) -> bool:
        """Whether any worker has several ranks."""
        return any(crew.num_ranks > 1 for crew in self.crews)

    def in_words(self) -> str:
        """Return how the nodes are shared out: ``2 prefill × 1 node + 1 decode × 2 nodes = 4 nodes``."""
        parts = [
            f"{crew.num_workers} {crew.role} × {_nodes(crew.num_nodes)}" for crew in self.crews
        ]
        return f"{' + '.join(parts)} = {_nodes(self.num_nodes)}"


def lay_out(
    settings: Settings, slurm: SlurmSettings, configs: Mapping[Role, EngineConfig]
) -> Layout:
    """Return the shape of the job. Raises ConfigError naming every role whose numbers do not fit."""
    on_gpus = settings.engine == "trtllm"
    gpus = (settings.gpus_per_node or DEFAULT_GPUS_PER_NODE) if on_gpus else 0
    notes = []
    if on_gpus and settings.gpus_per_node is None:
        notes.append(
            f"{gpus} GPUs per node are taken for granted; NUM_GPUS_PER_NODE or --gpus-per-node says "
            "how many there are"
        )
    crews, wrong = [], []
    for role, config in configs.items():
        world = World() if settings.engine == "sim" else world_of(config)
        asked = getattr(slurm, _NODES_OF[role])
        try:
            if on_gpus:
                nodes, per_node = _on_gpus(role, world, asked, gpus, settings)
            else:
                nodes, per_node = _on_cpus(role, world, asked, settings)
        except ConfigError as error:
            wrong.append(str(error))
            continue
        if on_gpus and per_node < gpus:
            notes.append(
                f"each {role} worker ({world.in_words}) leaves {gpus - per_node} of its node's {gpus} "
                "GPUs unused: a worker takes whole nodes"
            )
        crews.append(
            CrewShape(role, getattr(settings, _WORKERS_OF[role]), nodes, per_node, world.in_words)
        )
    if wrong:
        raise ConfigError("\n".join(wrong), param="num_nodes")
    return Layout(tuple(crews), gpus, tuple(notes))


def _on_gpus(
    role: Role, world: World, asked: int | None, gpus: int, settings: Settings
) -> tuple[int, int]:
    """Return (nodes, ranks on each) of a worker with one rank for each GPU."""
    if world.size <= gpus and asked in (None, 1):
        return 1, world.size
    nodes = asked or -(-world.size // gpus)
    if nodes * gpus != world.size:
        whole = -(-world.size // gpus)
        remedy = f"{_variable(role)}={whole}" if whole * gpus == world.size else ""
        remedy = f"set {remedy}, or " if remedy and whole != asked else ""
        raise ConfigError(
            f"{role} workers: {world.in_words} needs {_count(world.size, 'GPU')}, and "
            f"{_nodes(nodes)} × {_count(gpus, 'GPU')} = {nodes * gpus}; {remedy}give "
            f"{_file(role, settings)} a product of parallel sizes of {nodes * gpus}"
            + (
                ""
                if settings.gpus_per_node
                else ", or say how many GPUs a node has: NUM_GPUS_PER_NODE"
            )
        )
    return nodes, gpus


def _on_cpus(role: Role, world: World, asked: int | None, settings: Settings) -> tuple[int, int]:
    """Return (nodes, ranks on each) of a worker of an engine without GPUs."""
    nodes = asked or 1
    if world.size % nodes:
        raise ConfigError(
            f"{role} workers: {world.in_words} is {_count(world.size, 'rank')}, which cannot be spread "
            f"evenly over {_nodes(nodes)} ({_variable(role)}); set {_variable(role)} to a divisor of "
            f"{world.size}, or tensor_parallel_size in {_file(role, settings)} to a multiple of {nodes}"
        )
    return nodes, world.size // nodes


def give_nodes(layout: Layout, nodes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the nodes of each worker, by its name, in the order of the allocation.

    Raises ConfigError when there are too few.
    """
    if len(nodes) < layout.num_nodes:
        raise ConfigError(
            f"the workers need {layout.in_words()}, and this allocation has {len(nodes)} "
            f"({', '.join(nodes[:8])}{', …' if len(nodes) > 8 else ''}); ask for more nodes "
            f"(salloc --nodes={layout.num_nodes}), or for fewer or smaller workers",
            param="num_nodes",
        )
    found: dict[str, tuple[str, ...]] = {}
    at = 0
    for crew in layout.crews:
        for name in crew.worker_names():
            found[name] = tuple(nodes[at : at + crew.num_nodes])
            at += crew.num_nodes
    return found


def _variable(role: Role) -> str:
    return _NODES_OF[role].upper()


def _file(role: Role, settings: Settings) -> str:
    path = getattr(settings, ENGINE_CONFIG_OF[role])
    return str(path) if path else "the engine config"


def _nodes(number: int) -> str:
    return _count(number, "node")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

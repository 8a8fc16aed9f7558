"""The MPI worlds of a plan for engine trtllm: what starts each worker's ranks, and where. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.deploy.mpi import (
    MpiHost,
    World,
    launch_of,
    method_of,
    num_nodes_of,
    of_a_world,
    through_llmapi_launch,
    world_of,
)
from trtllm_workers.deploy.shares import Crew
from trtllm_workers.deploy.shm import EPLB_SHM_NAME, shm_name
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import Role

_NODES_OF_JOB = ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")


@dataclass(frozen=True, slots=True)
class Start:
    """A whole command line, its variables, and what of the launcher's it must not see."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    unset: frozenset[str] = frozenset()
    term_to_leader: bool = False


class Worlds:
    """Deals the nodes of an allocation to workers while they are planned, in their order."""

    def __init__(self, settings: Settings, host: MpiHost, run_id: str) -> None:
        self._settings = settings
        self._host = host
        self._run_id = run_id
        self._next_node = 0

    def settle(self, crews: Sequence[Crew], configs: Mapping[Role, EngineConfig]) -> list[Crew]:
        """Return the crews with the size of their worlds and what starts them. Raises ConfigError."""
        asked, mpi_cmd = self._settings.mpi_launch, self._settings.mpi_cmd
        worlds = {crew.role: world_of(configs.get(crew.role)) for crew in crews}
        methods = {
            role: method_of(world, asked, mpi_cmd, self._host) for role, world in worlds.items()
        }
        if "srun" in methods.values() and not mpi_cmd:
            # srun counts nodes from this one on; what started here by itself would meet its ranks.
            methods = {
                role: method_of(world, "srun", None, self._host) for role, world in worlds.items()
            }
        settled = [
            dataclasses.replace(
                crew,
                num_ranks=worlds[crew.role].size,
                in_words=worlds[crew.role].in_words,
                exclusive=True,
                method=methods[crew.role],
            )
            for crew in crews
        ]
        self._require_nodes(settled)
        return settled

    def start(
        self, crew: Crew, name: str, python: str, argv: Sequence[str], env: Mapping[str, str]
    ) -> Start:
        """Return how to start one worker of a settled crew. Raises ConfigError."""
        host = self._host
        own = {**env, EPLB_SHM_NAME: shm_name(self._run_id, name)}
        world = World(crew.num_ranks, crew.in_words)
        if crew.method == "srun":
            launch = launch_of("srun", world, host, own, first_node=self._next_node)
            self._next_node += num_nodes_of(world, host)
            words, more = through_llmapi_launch(python, argv)
            return Start((*launch.words, *words), {**own, **launch.env, **more})
        if crew.method == "told":
            launch = launch_of("told", world, host, own, mpi_cmd=self._settings.mpi_cmd)
        else:
            launch = launch_of("mpirun" if crew.method == "mpirun" else "spawn", world, host, own)
        return Start(
            (*launch.words, python, *argv),
            {**own, **launch.env},
            launch.unset,
            # Open MPI's mpirun answers TERM by killing all ranks within a second.
            term_to_leader=crew.method == "mpirun" and host.flavour == "openmpi",
        )

    def notes(self, crews: Sequence[Crew]) -> tuple[str, ...]:
        """Return what the operator should know about how the ranks start."""
        methods = {crew.method for crew in crews}
        notes: list[str] = []
        hidden = of_a_world(self._host.environ)
        if hidden and methods & {"spawn", "mpirun"}:
            families = sorted({f"{name.partition('_')[0]}_*" for name in hidden})
            notes.append(
                f"{' and '.join(families)} variables ({len(hidden)}) are kept from the workers: inside "
                "another MPI or SLURM world TensorRT-LLM could not start its ranks"
            )
        for crew in crews:
            if crew.method == "srun":
                notes += self._about_nodes(crew)
        if "srun" in methods:
            notes.append(
                "the run directory, the model and the engine configs must lie on a file system that "
                "all nodes see"
            )
        return tuple(notes)

    def _about_nodes(self, crew: Crew) -> list[str]:
        world, node = World(crew.num_ranks, crew.in_words), self._host.gpus_per_node
        nodes = num_nodes_of(world, self._host)
        kind = "" if crew.role is Role.AGGREGATED else f"{crew.role} "
        unused = nodes * node - world.size
        text = f"each {kind}worker takes {nodes} whole node{'s' if nodes > 1 else ''}"
        return [f"{text}; {unused} of {nodes * node} GPUs stay unused" if unused else text]

    def _require_nodes(self, crews: Sequence[Crew]) -> None:
        """Raise ConfigError when the allocation has fewer nodes than the workers need."""
        needs = {
            crew.role: num_nodes_of(World(crew.num_ranks, crew.in_words), self._host)
            for crew in crews
            if crew.method == "srun"
        }
        given = next((self._host.environ[n] for n in _NODES_OF_JOB if n in self._host.environ), "")
        total = sum(needs.get(crew.role, 0) * crew.num_workers for crew in crews)
        if given.isdigit() and total > int(given):
            sums = " + ".join(
                f"{crew.num_workers} {crew.role} × {needs[crew.role]}"
                for crew in crews
                if crew.role in needs
            )
            raise ConfigError(
                f"the workers need {sums} = {total} nodes of {self._host.gpus_per_node} GPUs, and this "
                f"SLURM allocation has {given}; ask for more nodes, or start fewer workers",
                param="num_workers",
            )

"""How the ranks of a TensorRT-LLM worker start: by itself, by mpirun, or by srun on several nodes. Pure.

::

    ranks                     started by                     who serves
    1                         TensorRT-LLM (MPI spawn)       the worker
    ≤ GPUs of a node          mpirun, else MPI spawn         rank 0 / the worker
    more                      srun … trtllm-llmapi-launch    rank 0, without MPI's variables
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trtllm_workers.config.env import ARGUMENTS, ARGUMENTS_FLAG, RANK_ENV, WORLD_SIZE
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.errors import ConfigError
from trtllm_workers.worker.rank_env import is_secret, of_mpirun, rank_variables

# mpiexec would otherwise start ranks by ssh or srun when the host name or SLURM variables say so.
THIS_HOST = ("-launcher", "fork", "-rmk", "user", "-localhost", "127.0.0.1")

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
# With these an MPI library takes itself for part of a world, or starts ranks by srun.
_OF_A_WORLD = ("SLURM_", "PMI_", "PMIX_", "PRTE_", "OMPI_")
_NOT_OF_A_WORLD = "OMPI_MCA_"
LLMAPI_LAUNCH = "trtllm-llmapi-launch"

Method = Literal["spawn", "told", "mpirun", "srun"]


@dataclass(frozen=True, slots=True)
class World:
    """How many ranks a worker has, and how that comes about (``tensor_parallel_size 4``)."""

    size: int = 1
    in_words: str = "tensor_parallel_size 1"


@dataclass(frozen=True, slots=True)
class MpiHost:
    """What matters of this host. ``gpus_per_node`` 0: unknown. ``flavour``: openmpi, mpich or ""."""

    gpus_per_node: int = 0
    mpirun: str = ""
    flavour: str = ""
    in_slurm_job: bool = False
    is_root: bool = False
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Launch:
    """What comes before a worker's command, and what changes in its environment."""

    words: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    unset: frozenset[str] = frozenset()


def world_of(config: EngineConfig | None) -> World:
    """Return the world of one worker of TensorRT-LLM: the product of its parallel sizes."""
    found = config.settings if config else {}
    sizes = {key: int(found[key].value or 1) for key in _SIZES if key in found}
    size = 1
    for one in sizes.values():
        size *= one
    said = {key: one for key, one in sizes.items() if one > 1} or {_SIZES[0]: 1}
    words = " × ".join(f"{key} {one}" for key, one in said.items())
    return World(size, words if len(said) == 1 else f"{words} = {size} ranks")


def method_of(world: World, asked: str, mpi_cmd: str | None, host: MpiHost) -> Method:
    """Return what starts the ranks. Raises ConfigError when what was asked for cannot work here."""
    if mpi_cmd:
        return "told"
    node = host.gpus_per_node
    if asked == "srun" or (node and world.size > node):
        return _srun(world, asked, host)
    if world.size == 1 or asked == "spawn":
        return "spawn"
    if host.mpirun and host.flavour:
        return "mpirun"
    if asked == "mpirun":
        lacks = "its --version names neither Open MPI nor MPICH" if host.mpirun else "none is here"
        raise ConfigError(
            f"--mpi-launch mpirun needs Open MPI's or MPICH's mpirun, and {lacks}; install one, "
            "or take --mpi-launch spawn",
            param="mpi_launch",
        )
    return "spawn"


def _srun(world: World, asked: str, host: MpiHost) -> Method:
    node = host.gpus_per_node
    if asked in ("spawn", "mpirun"):
        raise ConfigError(
            f"{world.in_words} needs {world.size} GPUs, and a node has {node}: ranks on several nodes "
            f"start by srun, not by --mpi-launch {asked}",
            param="mpi_launch",
        )
    if not host.in_slurm_job:
        nodes = _num_nodes(world, node) if node else 1
        raise ConfigError(
            f"{world.in_words} needs {world.size} GPUs, and a node has {node or 'an unknown number'}: "
            f"its ranks start by srun, which needs a SLURM allocation (SLURM_JOB_ID is not set); "
            f"start inside one, e.g. salloc --nodes={nodes}, or say --gpus-per-node",
            param="mpi_launch",
        )
    if not node:
        raise ConfigError(
            "--mpi-launch srun needs to know how many GPUs a node has; say --gpus-per-node N",
            param="gpus_per_node",
        )
    num_nodes_of(world, host)
    return "srun"


def _num_nodes(world: World, node: int) -> int:
    return -(-world.size // node)


def num_nodes_of(world: World, host: MpiHost) -> int:
    """Return how many whole nodes a world takes under srun. Raises ConfigError when it leaves a rest."""
    node = host.gpus_per_node
    if world.size > node and world.size % node:
        whole = world.size // node
        raise ConfigError(
            f"{world.in_words}: {world.size} ranks are not a whole number of nodes of {node} GPUs "
            f"({world.size} = {whole} × {node} + {world.size % node}); "
            f"take {whole * node} or {(whole + 1) * node} ranks, or correct --gpus-per-node",
            param="gpus_per_node",
        )
    return _num_nodes(world, node)


def launch_of(
    method: Method,
    world: World,
    host: MpiHost,
    own_env: Mapping[str, str],
    *,
    mpi_cmd: str | None = None,
    first_node: int = 0,
) -> Launch:
    """Return how to start a worker whose variables, on top of the host's, are ``own_env``.

    ``first_node`` is the first of its nodes in the allocation.
    """
    if method == "spawn":
        return Launch(unset=of_a_world(host.environ))
    shared = rank_variables({**host.environ, **own_env})
    if method == "srun":
        # Each node's own devices are SLURM's to name.
        shared.pop("CUDA_VISIBLE_DEVICES", None)
    written = {name: value for name, value in shared.items() if not is_secret(name)}
    env = {RANK_ENV: json.dumps(written, sort_keys=True)}
    if method == "told":
        return Launch(_split(mpi_cmd or ""), env)
    if method == "srun":
        return Launch(_srun_words(world, host, first_node), env)
    env[WORLD_SIZE] = str(world.size)
    unset = of_a_world(host.environ)
    if host.flavour == "mpich":
        # -genvlist would withhold what is not on the list, PATH and secrets included.
        words = (host.mpirun, *THIS_HOST, "-genvall", "-n", str(world.size))
        return Launch(words, env, unset)
    names = sorted({*shared, *own_env, *env})
    return Launch(
        (
            *(host.mpirun, "-n", str(world.size), "--oversubscribe"),
            *(("--allow-run-as-root",) if host.is_root else ()),
            *("--bind-to", "none"),
            *(word for name in names for word in ("-x", name)),
        ),
        env,
        unset,
    )


def of_a_world(environ: Mapping[str, str]) -> frozenset[str]:
    """Return the variables that make an MPI library take a new process for part of another world."""
    return frozenset(
        name
        for name in environ
        if name.startswith(_OF_A_WORLD)
        and (not name.startswith(_NOT_OF_A_WORLD) or of_mpirun(name))
    )


def _srun_words(world: World, host: MpiHost, first_node: int) -> tuple[str, ...]:
    nodes = num_nodes_of(world, host)
    return (
        *("srun", "--mpi=pmix", f"--nodes={nodes}", f"--ntasks={world.size}"),
        *(f"--ntasks-per-node={world.size // nodes}", f"--relative={first_node}"),
        # Steps share the allocation with the ingress and with each other's control processes.
        *("--overlap", "--oversubscribe", "--cpu-bind=none", "--export=ALL"),
        *("--kill-on-bad-exit=1", "--label", LLMAPI_LAUNCH),
    )


def _split(mpi_cmd: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(mpi_cmd))
    except ValueError as wrong:
        raise ConfigError(f"--mpi-cmd: {wrong}: {mpi_cmd}", param="mpi_cmd") from wrong


def through_llmapi_launch(
    python: str, argv: Sequence[str], verb: str = "worker"
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return a command that survives ``trtllm-llmapi-launch``, and variables that it needs for that.

    The script splits its arguments on white space, expands patterns in them and drops empty ones; where
    one would suffer, all that follow ``verb`` travel in a variable. Raises ConfigError for a path of the
    interpreter that cannot be passed on.
    """
    if _suffers(python):
        raise ConfigError(
            f"the path of Python, {python}, has characters that {LLMAPI_LAUNCH} does not pass on (white "
            "space or a pattern); install the environment under another path",
            param="mpi_launch",
        )
    if not any(_suffers(word) for word in argv):
        return (python, *argv), {}
    start = argv.index(verb) + 1
    return (python, *argv[:start], ARGUMENTS_FLAG), {ARGUMENTS: json.dumps(list(argv[start:]))}


def _suffers(word: str) -> bool:
    return not word or any(letter.isspace() or letter in "*?[]\\" for letter in word)

"""One environment for all ranks of a worker: which variables count, and a check that they agree.

What starts ranks loses variables on the way: an mpirun forwards some, ``trtllm-llmapi-launch`` clears
those of MPI, UCX and SLURM on rank 0. A rank that misses one picks another transport than its peers, and
they hang or disagree later. So the launcher writes the values down once, each rank applies them
(``config/env.py``), and before anything is loaded all ranks compare what they have.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtllm_workers.errors import ConfigError, StartError

_PREFIXES = ("UCX_", "NCCL_", "NIXL_", "TRTLLM_", "TLLM_", "HF_", "OMPI_MCA_")
_NAMES = frozenset(
    {
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "LD_LIBRARY_PATH",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
        "TRANSFORMERS_OFFLINE",
    }
)
# The launcher's own, and the addresses that trtllm-llmapi-launch makes anew on every rank.
_OTHERS = ("TRTLLM_LAUNCH_", "TLLM_SPAWN_PROXY_")
# What an mpirun itself puts beside the operator's OMPI_MCA_ parameters; some differ by rank.
_OF_MPIRUN = re.compile(
    r"OMPI_MCA_(orte_|prte_|ess|pmix|shmem_RUNTIME|initial_wdir|num_procs|cpu_type|PREFIXES)"
)
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|KEY|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
_SHARED = "/dev/shm/mpich_shm_"
_DEADLINE_S = 60.0
_LOOK_INTERVAL_S = 0.01
# How long a rank leaves the report to rank 0, which ends the world with it.
_SILENCE_S = 2.0


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every rank of a worker must see alike, secret ones included."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if (name in _NAMES or name.startswith(_PREFIXES))
        and not name.startswith(_OTHERS)
        and not of_mpirun(name)
    }


def of_mpirun(name: str) -> bool:
    """Return whether an OMPI_MCA_ variable is an mpirun's own rather than the operator's."""
    return _OF_MPIRUN.match(name) is not None


def is_secret(name: str) -> bool:
    """Return whether a variable's value must not be written anywhere."""
    return _SECRET.search(name) is not None


def difference(everyone: Sequence[Mapping[str, str]]) -> str:
    """Return what differs between the variables of the ranks, in words; "" when nothing does."""
    lines = []
    for name in sorted({name for mine in everyone for name in mine}):
        ranks_by_value: dict[str | None, list[int]] = {}
        for rank, mine in enumerate(everyone):
            ranks_by_value.setdefault(mine.get(name), []).append(rank)
        if len(ranks_by_value) > 1:
            seen = "; ".join(
                f"{_shown(name, value)} on {_listed(ranks)}"
                for value, ranks in ranks_by_value.items()
            )
            lines.append(f"{name}: {seen}")
    return "\n".join(lines)


def join_world(environ: Mapping[str, str], size: int, deadline_s: float = _DEADLINE_S) -> int:
    """Return this process's rank in the MPI world, once all ``size`` ranks see the same variables.

    Raises ConfigError when the world has another size or the ranks' variables differ, StartError when
    a rank does not come. Every rank raises alike; rank 0 first, so that its report is the one seen.
    """
    mpi = _import_mpi()
    world = mpi.COMM_WORLD
    came = _all_came(world, deadline_s)
    if came:
        _forget_names(world)
    if world.Get_size() != size:
        raise ConfigError(
            f"{size} ranks were started as one worker, but this process is in an MPI world of "
            f"{world.Get_size()}: what started it and the MPI library of mpi4py "
            f"({mpi.Get_library_version().strip().splitlines()[0]}) do not belong together; use the "
            "mpirun of that library, or --mpi-launch spawn",
            param="mpi_launch",
        )
    if not came:
        raise StartError(
            f"not every one of the {size} ranks came within {deadline_s:g} s; on a host with several "
            "networks OMPI_MCA_btl_tcp_if_include names the one that reaches all ranks"
        )
    mine = {name: _comparable(name, value) for name, value in rank_variables(environ).items()}
    if len(set(world.allgather(_digest(mine)))) > 1:
        text = difference(world.allgather(mine))
        if world.Get_rank() > 0:
            _all_came(world, _SILENCE_S)
        raise ConfigError(
            f"the {size} ranks of this worker see different environments, so they would not agree "
            f"with each other; set these for the launcher, or for no rank:\n{text}",
            param="mpi_launch",
        )
    return int(world.Get_rank())


def _digest(mine: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()


def _comparable(name: str, value: str) -> str:
    """Return a value as it travels between ranks: a secret only as its hash."""
    return hashlib.sha256(value.encode()).hexdigest() if is_secret(name) else value


def _all_came(world: Any, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> bool:
    """Wait until every rank has come here, at most so long; a blocking barrier would wait for ever."""
    request = world.Ibarrier()
    ends_s = clock() + deadline_s
    while not request.Test():
        if clock() > ends_s:
            return False
        time.sleep(_LOOK_INTERVAL_S)
    return True


def _forget_names(world: Any) -> None:
    """Remove the names of MPICH's shared memory, which every rank has mapped by now.

    So it goes with the last rank, also when they are killed; MPICH would remove it only in the end.
    """
    # Every rank: each host has names of its own, and the first to come removes them.
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for name in set(re.findall(rf"{_SHARED}\S+$", maps, re.MULTILINE)):
        with contextlib.suppress(OSError):
            os.unlink(name)
    world.Barrier()


def _import_mpi() -> Any:
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        raise ConfigError(
            f"several ranks need MPI, which cannot be loaded: {error}; "
            "run: pip install mpi4py, and an MPI library beside it",
            param="mpi_launch",
        ) from error


def _shown(name: str, value: str | None) -> str:
    if value is None:
        return "not set"
    return "another value (not shown)" if is_secret(name) else repr(value)


def _listed(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}{' …' if len(ranks) > 8 else ''}"

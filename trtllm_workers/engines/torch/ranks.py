"""The ranks of one worker and what they say to each other, over MPI. Knows no model and no request.

MPI is imported only where a worker has several ranks. All calls of a process come from one thread at
a time: the engine's, once it runs. What ranks must decide alike goes through ``together``, ``gather``
and ``all``, so that no rank waits in a call that another never makes.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.errors import ConfigError, LaunchError, StartError
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

_KEY = "tensor_parallel_size"
_ORDERS_TAG = 7
# A step's pause on rank 0 (sampling, telling the loop) is shorter than this; an idle engine's is not.
_AWAKE_S = 0.001
_SHORTEST_NAP_S = 50e-6
_LONGEST_NAP_S = 1e-3
_BROKEN_EXIT_CODE = 4
_SHARED = "/dev/shm/mpich_shm_"


class Ranks:
    """One rank among ``size``; alone, every call is local and costs nothing."""

    def __init__(self, comm: Any = None, mpi: Any = None) -> None:
        self._comm = comm
        self._mpi = mpi
        self.rank: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()
        self._parts = torch.empty(0, dtype=torch.uint8)
        self._is_broken = False

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in order of ranks, on every rank."""
        return [value] if self._comm is None else self._comm.allgather(value)

    def all(self, fact: bool) -> bool:
        """Return whether it holds on every rank."""
        return all(self.gather(fact))

    def from_first(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        return self.gather(value)[0]

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action``, which makes no call to other ranks; if it fails on one, raise on all."""
        if self._comm is None:
            return action()
        found: T | None = None
        failure: Exception | None = None
        try:
            found = action()
        except Exception as error:  # noqa: BLE001 - raised below, once the others know
            failure = error
        told = None
        if failure is not None:
            message = str(failure) or repr(failure)
            told = (isinstance(failure, ConfigError), getattr(failure, "param", None), message)
        failures = self.gather(told)
        if failure is not None:
            raise failure
        for rank, other in enumerate(failures):
            if other is not None:
                is_config, param, message = other
                kind: type[LaunchError] = ConfigError if is_config else StartError
                raise kind(f"rank {rank} of {self.size}: {message}", param=param)
        return found  # type: ignore[return-value] # the action's own, None included

    def side_by_side(self, part: torch.Tensor) -> torch.Tensor:
        """Return all ranks' ``part`` [rows, columns], columns in order of ranks: [rows, size × columns]."""
        if self._comm is None:
            return part
        num_bytes = part.nbytes
        if self._parts.numel() < num_bytes * self.size:
            self._parts = torch.empty(num_bytes * self.size, dtype=torch.uint8)
        held = self._parts[: num_bytes * self.size]
        parts = held.view(part.dtype).view(self.size, *part.shape)
        parts[self.rank].copy_(part)  # also from a GPU
        if num_bytes:
            self._comm.Allgather(self._mpi.IN_PLACE, [held.numpy(), self._mpi.BYTE])
        whole = torch.empty(part.shape[0], self.size, part.shape[1], dtype=part.dtype)
        whole.copy_(parts.transpose(0, 1))  # out of the buffer, which the next call overwrites
        return whole.view(part.shape[0], -1).to(part.device)

    def send(self, message: object) -> None:
        """Send an object from rank 0 to all others."""
        if self._comm is None:
            return
        packed = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        for rank in range(1, self.size):
            self._comm.Send([packed, self._mpi.BYTE], dest=rank, tag=_ORDERS_TAG)

    def receive(self) -> Any:
        """Return the next object that rank 0 sent; waits asleep, but for the first moment."""
        status = self._mpi.Status()
        asleep_from_s = time.monotonic() + _AWAKE_S
        nap_s = _SHORTEST_NAP_S
        while not self._comm.Iprobe(source=0, tag=_ORDERS_TAG, status=status):
            if time.monotonic() < asleep_from_s:
                os.sched_yield()  # another process may want the core
            else:
                time.sleep(nap_s)
                nap_s = min(2 * nap_s, _LONGEST_NAP_S)
        packed = bytearray(status.Get_count(self._mpi.BYTE))
        self._comm.Recv([packed, self._mpi.BYTE], source=0, tag=_ORDERS_TAG)
        return pickle.loads(packed)

    def abort(self) -> None:
        """End every process of the world, this one included, at once."""
        if self._comm is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            self._comm.Abort(_BROKEN_EXIT_CODE)

    def abort_at_exit(self) -> None:
        """End the world when this process ends: the others may wait in a call that never comes."""
        if self._comm is not None and not self._is_broken:
            self._is_broken = True
            atexit.register(self.abort)


ALONE = Ranks()


def join(tensor_parallel_size: int) -> Ranks:
    """Return this process's place among the ranks of its worker; may be called again.

    Raises ConfigError when MPI is not there, or its world has another size.
    """
    if tensor_parallel_size == 1:
        return ALONE
    mpi = _import_mpi(tensor_parallel_size)
    world = mpi.COMM_WORLD
    _forget_names(world)
    if world.Get_size() != tensor_parallel_size:
        raise ConfigError(
            f"{_KEY} {tensor_parallel_size} needs an MPI world of {tensor_parallel_size} ranks, but "
            f"this process is in one of {world.Get_size()}; start the worker with 'mpiexec -n "
            f"{tensor_parallel_size} python -m mpi4py -m trtllm_workers.cli.main worker …', with the "
            "mpiexec of the MPI library that mpi4py loads",
            param=_KEY,
        )
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise ConfigError(
            f"{_KEY} {tensor_parallel_size}: this MPI library ({mpi.Get_library_version().strip()}) "
            "allows calls from the main thread only; use one with MPI_THREAD_SERIALIZED",
            param=_KEY,
        )
    return Ranks(world, mpi)


def _forget_names(world: Any) -> None:
    """Remove the names of MPICH's shared memory, which every rank has mapped by now.

    So it goes with the last rank, also when they are killed; MPICH would remove it only in the end.
    """
    world.Barrier()
    # Every rank: each host has names of its own, and the first to come removes them.
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    for name in set(re.findall(rf"{_SHARED}\S+$", maps, re.MULTILINE)):
        with contextlib.suppress(OSError):
            os.unlink(name)
    world.Barrier()


def run_follower(options: EngineOptions) -> None:
    """Compute this rank's part of every step until rank 0 stops; returns then.

    For ranks above 0. Also returns when no rank could start, which rank 0 reports. Any other failure
    ends the world.
    """
    # Imported here: the engine's modules import this one.
    from trtllm_workers.engines.torch.follower import follow

    follow(options)


def _import_mpi(tensor_parallel_size: int) -> Any:
    # mpich's and Open MPI's wheels bring a UCX of their own. When theirs is loaded first, that of the
    # KV transport fails with undefined symbols; the other way round both work.
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("libucx").load_library()
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        raise ConfigError(
            f"{_KEY} {tensor_parallel_size} needs MPI, which cannot be loaded: {error}; "
            "run: pip install 'trtllm-launch[mpi]'",
            param=_KEY,
        ) from error

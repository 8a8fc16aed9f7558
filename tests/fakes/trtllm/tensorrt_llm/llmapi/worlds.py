"""Ranks: how a world of several processes comes about, and what rank 0 asks of the others."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

_HERE, _BYE = 71, 72
_WORLD_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_NO_SPAWN = ("SLURM_JOB_ID", "SLURM_JOBID", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


class World:
    """What one ``LLM`` has of ranks: nothing (a world of its own), an MPI world, or a proxy's."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._comm: Any = None
        self._proxy: socket.socket | None = None
        if os.environ.get("TLLM_SPAWN_PROXY_PROCESS") == "1":
            self._use_proxy()
        elif any(int(os.environ.get(name) or 1) > 1 for name in _WORLD_VARIABLES):
            self._use_mpi()
        elif size > 1:
            self._spawn()

    def _use_mpi(self) -> None:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.rank != 0:
            raise RuntimeError("only rank 0 can start multi-node session")
        if comm.size != self._size:
            raise RuntimeError(
                f"world size {self._size} does not match the MPI world of {comm.size}"
            )
        for rank in range(1, comm.size):
            comm.recv(source=rank, tag=_HERE)
        self._comm = comm

    def _use_proxy(self) -> None:
        host, port = (
            os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"].removeprefix("tcp://").split(":")
        )
        key = os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"]
        if int(os.environ["tllm_mpi_size"]) != self._size:
            raise RuntimeError(
                f"world size {self._size} does not match tllm_mpi_size {os.environ['tllm_mpi_size']}"
            )
        self._proxy = _patiently(host, int(port))
        self._proxy.sendall(key.encode() + b"\n")
        if self._proxy.recv(3) != b"ok\n":
            raise RuntimeError("the proxy refused")

    def _spawn(self) -> None:
        """MPI_Comm_spawn: works only outside of every job and world."""
        if any(name in os.environ for name in _NO_SPAWN):
            raise RuntimeError("All nodes which are allocated for this job are already filled.")

    def shutdown(self) -> None:
        """Let the other ranks go."""
        if self._comm is not None:
            for rank in range(1, self._comm.size):
                self._comm.send(None, dest=rank, tag=_BYE)
            self._comm = None
        if self._proxy is not None:
            self._proxy.close()
            self._proxy = None


def follow() -> None:
    """What a rank above 0 does: wait until rank 0 is done."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    print(f"run mgmn worker node with mpi_world_size: {comm.size}", flush=True)
    if comm.rank == 0:
        raise RuntimeError("rank 0 is no worker node")
    comm.send(None, dest=0, tag=_HERE)
    comm.recv(source=0, tag=_BYE)


def lead() -> None:
    """What rank 0 of a launched world does beside the user's command: stand in for it in the MPI world."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    host, port = os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_ADDR"].removeprefix("tcp://").split(":")
    for rank in range(1, comm.size):
        comm.recv(source=rank, tag=_HERE)
    with socket.create_server((host, int(port))) as server:
        client, _ = server.accept()
        with client, client.makefile("rb") as lines:
            if (
                lines.readline().strip().decode()
                == os.environ["TLLM_SPAWN_PROXY_PROCESS_IPC_HMAC_KEY"]
            ):
                client.sendall(b"ok\n")
                lines.read()  # until the user's process is gone
    for rank in range(1, comm.size):
        comm.send(None, dest=rank, tag=_BYE)


def _patiently(host: str, port: int) -> socket.socket:
    """Connect to a proxy that is starting beside us; ZeroMQ, which the real one uses, waits too."""
    ends_s = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((host, port), 20)
        except ConnectionRefusedError:
            if time.monotonic() > ends_s:
                raise
            time.sleep(0.05)

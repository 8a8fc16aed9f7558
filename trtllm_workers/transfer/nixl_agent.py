"""What we need of NIXL: an agent with one registered pool, and transfers of its blocks.

The only module that knows NIXL's bindings. ``nixl_cu12`` or ``nixl_cu13`` is imported directly:
the meta package ``nixl`` brings both and CUDA's torch. NIXL's own ``nixl_agent`` class is not used: it
sets the progress thread's delay to 0, with which that thread spins.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from trtllm_workers.config.env import prepare_ucx_of_nixl
from trtllm_workers.errors import TransferFailed, TransportUnavailable
from trtllm_workers.transfer.base import KvPool

_PACKAGES: Final = ("nixl_cu12", "nixl_cu13")
# How long the progress thread sleeps when nothing wakes it, in microseconds. UCX's events do wake it
# (measured with NIXL 1.5.1: 0.05 % CPU while idle, the same latency as with 200).
_PROGRESS_DELAY_US: Final = 100_000


class Direction(Enum):
    """Which way the blocks go."""

    READ = "NIXL_READ"
    WRITE = "NIXL_WRITE"


def load_bindings() -> Any:
    """Return NIXL's bindings. Raises TransportUnavailable, saying what to install."""
    prepare_ucx_of_nixl()
    reasons = []
    for package in _PACKAGES:
        try:
            importlib.import_module("numpy")
            return importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            reasons.append(str(error))
    raise TransportUnavailable(
        f"transport nixl needs NIXL ({'; '.join(reasons)}); run: pip install 'trtllm-launch[nixl]'"
    )


class Agent:
    """One NIXL agent: with ``serves`` for peers to read and write, without it to do so ourselves.

    A serving one has a progress thread, which ends the set-up of connections and moves the bytes
    that the wire does not move alone. One that does not serve is progressed by ``done``.
    Closing it ends every transfer: after that no byte moves, whatever the wire.
    """

    def __init__(self, bindings: Any, pool: KvPool, our_id: str, *, serves: bool) -> None:
        import numpy as np  # comes with the nixl extra only

        self._np = np
        self._nixl = bindings
        self._block_bytes = pool.layout.block_bytes
        # Its name must differ from that of every other life of this worker.
        self.name = f"{our_id}-{os.urandom(8).hex()}"
        self._memory = np.frombuffer(pool.memory, dtype=np.uint8)
        self.base: int = self._memory.ctypes.data
        self._ours = 0
        self._theirs = 0
        self._handles: set[int] = set()
        config = bindings.nixlAgentConfig()
        config.useProgThread = serves
        config.pthrDelay = _PROGRESS_DELAY_US
        config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
        self._agent: Any = None
        try:
            self._agent = bindings.nixlAgent(self.name, config)
            self._agent.createBackend("UCX", {})
            region = (self.base, self._memory.nbytes, 0, "")
            self._agent.registerMem(bindings.nixlRegDList(bindings.DRAM_SEG, [region]), [])
            if not serves:
                self._ours = self._prepare("", self.base, pool.num_blocks)
        except Exception as error:
            self.close()
            if not _is_nixl(error):
                raise
            raise TransportUnavailable(
                f"transport nixl cannot register the KV pool of {self._memory_size(pool)} with UCX: "
                f"{error}; see its words on stderr, or use another --kv-transport"
            ) from error

    @staticmethod
    def _memory_size(pool: KvPool) -> str:
        return f"{pool.num_blocks} blocks of {pool.layout.block_bytes} bytes"

    def metadata(self) -> bytes:
        """Return what another agent needs to reach this one's pool; secret."""
        described: bytes = self._agent.getLocalMD()
        return described

    def meet(self, metadata: bytes, base: int, num_blocks: int) -> None:
        """Learn of the peer's pool, at its address ``base``. Raises TransferFailed."""
        try:
            name = self._agent.loadRemoteMD(metadata).decode()
            self._theirs = self._prepare(name, base, num_blocks)
        except Exception as error:
            raise _failed(error, "its card cannot be used") from error

    def _prepare(self, agent_name: str, base: int, num_blocks: int) -> int:
        size = self._block_bytes
        strided = self._np.array([[base, size, 0, size, num_blocks]], dtype=self._np.uint64)
        # NIXL takes this as num_blocks regions, and later transfers by their index.
        return int(self._agent.prepXferDlist(agent_name, self._nixl.DRAM_SEG, strided, []))

    def begin(
        self, direction: Direction, local: Sequence[int], remote: Sequence[int]
    ) -> int | None:
        """Start moving blocks; return the transfer, or None when it is done already.

        Raises TransferFailed.
        """
        np = self._np
        try:
            handle = int(
                self._agent.makeXferReq(
                    getattr(self._nixl, direction.value),
                    self._ours,
                    np.array(local, dtype=np.int32),
                    self._theirs,
                    np.array(remote, dtype=np.int32),
                )
            )
            self._handles.add(handle)
            under_way = self._agent.postXferReq(handle) == self._nixl.NIXL_IN_PROG
        except Exception as error:
            raise _failed(error, "NIXL cannot start the transfer") from error
        if under_way:
            return handle
        self._release(handle)
        return None

    def done(self, handle: int) -> bool:
        """Push a transfer on; return whether it is done, and then forget it. Raises TransferFailed."""
        try:
            if self._agent.getXferStatus(handle) == self._nixl.NIXL_IN_PROG:
                return False
            self._release(handle)
        except Exception as error:
            raise _failed(error, "NIXL gave the transfer up") from error
        return True

    def _release(self, handle: int) -> None:
        self._handles.discard(handle)
        self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """End all transfers and the agent. Safe twice.

        Releasing a transfer is not enough: over TCP its bytes were seen to land later (NIXL 1.5.1).
        With the agent its sockets and its worker are gone, and nothing can move them.
        """
        agent, self._agent = self._agent, None
        if agent is None:
            return
        for end, handles in (
            (agent.releaseXferReq, sorted(self._handles)),
            (agent.releasedDlistH, [handle for handle in (self._ours, self._theirs) if handle]),
        ):
            for handle in handles:
                try:
                    end(handle)
                except Exception as error:
                    if not _is_nixl(error):
                        raise
        self._handles.clear()
        self._ours = self._theirs = 0
        self._memory = self._np.empty(0, dtype=self._np.uint8)  # lets go of the pool


def _is_nixl(error: Exception) -> bool:
    """Return whether an error is one of NIXL's, which share no base class."""
    return type(error).__name__.startswith("nixl")


def _failed(error: Exception, what: str) -> Exception:
    """Return NIXL's error as ours, and any other as it is."""
    if _is_nixl(error):
        return TransferFailed(f"{what}: {error}")
    return error

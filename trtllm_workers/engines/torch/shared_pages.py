"""One KV pool in the memory of several processes of a host. Knows pages, no blocks."""

from __future__ import annotations

import mmap
import os
import socket
from pathlib import Path

from trtllm_workers.engines.torch.ranks import Ranks
from trtllm_workers.errors import StartError


def on_one_host(ranks: Ranks) -> bool:
    """Return whether all ranks can share memory; in several containers they cannot."""
    return len(set(ranks.gather(_place()))) == 1


def share_pages(ranks: Ranks, num_bytes: int) -> mmap.mmap:
    """Return zeroed memory that all ranks see; they are on one host.

    Rank 0 makes it, the others map it through rank 0's open file. It has no name, so that nothing is
    left however the processes end.
    """
    made = -1
    try:
        if ranks.rank == 0:
            made = os.memfd_create("kv-pool")
            os.ftruncate(made, num_bytes)
        owner, number = ranks.from_first((os.getpid(), made))
        path = Path(f"/proc/{owner}/fd/{number}")
        # After it everybody has mapped the file, and nobody needs the descriptor.
        return ranks.together(lambda: _mapped(path, num_bytes))
    finally:
        if made >= 0:
            os.close(made)


def _place() -> tuple[str, ...]:
    """Return what is equal for processes that can open each other's files under /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return (socket.gethostname(), str(os.getpid()))  # cannot tell: nobody's neighbour
    return (socket.gethostname(), boot, namespace)


def _mapped(path: Path, num_bytes: int) -> mmap.mmap:
    try:
        opened = os.open(path, os.O_RDWR)
    except OSError as error:
        raise StartError(
            f"cannot map the KV pool of rank 0 ({path}): {error}; "
            "all ranks of a worker must run under one user"
        ) from error
    try:
        return mmap.mmap(opened, num_bytes, flags=mmap.MAP_SHARED)
    finally:
        os.close(opened)

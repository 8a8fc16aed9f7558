"""What a NIXL peer tells about itself, and whether its wire to us is fit. Knows no NIXL call."""

from __future__ import annotations

import os
from pathlib import Path

from trtllm_workers.errors import TransferFailed
from trtllm_workers.transfer.tcp_channel import Door


class NixlDoor(Door, frozen=True, array_like=True):
    """A door, and what NIXL needs to reach the pool behind it, which begins at ``base``.

    ``place`` is equal for processes that can read each other's memory; ``has_rdma`` tells of the host.
    """

    metadata: bytes
    base: int
    place: str
    has_rdma: bool


def this_place() -> str:
    """Return what is equal for processes of one kernel, pid namespace and user namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "user")]
    return " ".join([boot, *spaces])


def has_rdma() -> bool:
    """Return whether this host has an RDMA device, InfiniBand or Ethernet."""
    return any(Path("/sys/class/infiniband").glob("*"))


def check_wire(ours: NixlDoor, theirs: NixlDoor, peer_id: str) -> None:
    """Raise TransferFailed when NIXL could only use UCX's emulation of reads over TCP.

    There a reader that dies or gives up in mid-read ends the *owner's* process ("Fatal: unexpected
    error: Endpoint timeout", seen with NIXL 1.5.1 and either error handling mode): one worker's
    death must not be another's.
    """
    if theirs.place != ours.place and not (theirs.has_rdma and ours.has_rdma):
        raise TransferFailed(
            f"connect to {peer_id}: it shares neither memory nor an RDMA network with this worker, "
            "and over TCP NIXL lets a dying reader end its peer; start both with --kv-transport "
            "ucx or tcp"
        )

"""What a UCX peer tells about itself, and whether its process still lives. Knows no UCX call."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path

import msgspec

from trtllm_workers.errors import TransferFailed


class HostIdentity(msgspec.Struct, frozen=True, array_like=True):
    """Which kernel and which process table a process sees: equal values can watch each other."""

    boot_id: str
    pid_namespace: int


class UcxAddress(msgspec.Struct, frozen=True, array_like=True):
    """The ``address`` of a TransportCard. Whoever has it may read and write the pool.

    ``worker`` answers one-sided calls, ``notify_worker`` takes messages, which must begin with
    ``token``. ``hello`` is memory that holds the token: reading it proves that the peer is there.
    ``net_worker`` serves peers that reach none of these; empty: nobody does.
    """

    worker: bytes
    notify_worker: bytes
    pool_address: int
    pool_key: bytes
    hello_address: int
    hello_key: bytes
    token: bytes
    host: HostIdentity
    pid: int
    started_ticks: int
    net_worker: bytes = b""


def this_host() -> HostIdentity:
    """Return the identity of the host as this process sees it."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return HostIdentity(boot_id, Path("/proc/self/ns/pid").stat().st_ino)


def started_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None: there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # the name before may hold spaces and brackets


def decode_address(address: bytes, peer_id: str) -> UcxAddress:
    """Return what a card carries. Raises TransferFailed when it is not ours."""
    try:
        return msgspec.msgpack.decode(address, type=UcxAddress)
    except msgspec.MsgspecError as error:
        raise TransferFailed(
            f"the card of {peer_id} does not hold an address of the ucx transport ({error}); "
            "do both workers run the same version?"
        ) from error


class PeerProcess:
    """Watches a peer's process, where it runs under the same kernel; elsewhere it never says gone."""

    def __init__(self, peer: UcxAddress) -> None:
        self._pid = peer.pid
        self._descriptor: int | None = None
        self._poll = select.poll()
        self._gone = False
        if peer.host != this_host():
            return
        with contextlib.suppress(ProcessLookupError):
            self._descriptor = os.pidfd_open(peer.pid)
            self._poll.register(self._descriptor, select.POLLIN)
        # Read after opening: a process id that was used again has another start time.
        self._gone = started_ticks(peer.pid) != peer.started_ticks

    def gone(self) -> bool:
        """Return whether the process has ended."""
        if not self._gone and self._descriptor is not None:
            self._gone = bool(self._poll.poll(0))
        return self._gone

    def close(self) -> None:
        """Stop watching; safe twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

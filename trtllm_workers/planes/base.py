"""The two contracts of this floor: the request plane and discovery. Holds no socket.

tests/contract/test_request_plane.py and tests/contract/test_discovery.py check each line.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from trtllm_workers.errors import PeerLost
from trtllm_workers.planes.messages import Message
from trtllm_workers.types import Address, WorkerRecord


class Peer(Protocol):
    """One authenticated connection to another process.

    * ``send`` does not block and keeps order; everything sent in one loop iteration leaves in one
      write. On a lost connection it raises PeerLost.
    * ``write_paused`` is true while the peer reads slower than we send.
    """

    @property
    def address(self) -> Address: ...
    @property
    def write_paused(self) -> bool: ...

    def send(self, message: Message) -> None: ...


OnMessage = Callable[[Peer, Message], None]
OnLost = Callable[[Peer, PeerLost], None]


class RequestPlane(Protocol):
    """Messages between processes, without a broker.

    * After ``start``, ``address`` is where others reach us; port 0 became a real port.
    * ``connect`` returns an authenticated peer within ``timeout_s`` or raises: PeerLost (nobody
      there, says the address), AuthenticationFailed (secret differs), StaleIncarnation (another
      life answered). A live connection to the same peer is reused, whoever opened it.
    * ``peer`` returns the live connection to an address, or None; ``peers`` all live ones.
    * ``on_message`` runs on the event loop, in order per peer; nothing of a peer arrives before it
      has proven the secret. An exception in it closes that connection only.
    * ``on_lost`` is called once per connection when it ends, however it ends: closed, reset, silent
      for longer than the ping deadline, or sending bytes that are no frame.
    * ``close`` closes every connection; safe twice; afterwards no task or socket is left.
    """

    @property
    def address(self) -> Address: ...

    async def start(self) -> None: ...
    async def connect(self, address: Address, timeout_s: float = 5.0) -> Peer: ...
    def peer(self, address: Address) -> Peer | None: ...
    def peers(self) -> Sequence[Peer]: ...
    async def close(self) -> None: ...


class Lease(Protocol):
    """A registration that vanishes with its owner.

    * ``update`` replaces the record; watchers see it.
    * ``close`` removes it at once; safe twice.
    """

    async def update(self, record: WorkerRecord) -> None: ...
    async def close(self) -> None: ...


class Discovery(Protocol):
    """Who is alive and where.

    * ``register`` makes the record visible to every watcher and keeps it so until the lease closes.
    * A record whose owner died without closing vanishes after ``ttl_s``, or sooner where death can be
      seen (same host).
    * ``watch`` yields the full set of live records now and after every change, each sorted by
      worker_id; slow readers see the latest set, not every step.
    * Two records of one worker_id: the younger incarnation wins; the older lease's updates are
      refused with ConfigError while the younger lives.
    * A record that cannot be read (foreign file, newer version) is skipped and logged once.
    * ``close`` ends watches and leases; safe twice.
    """

    async def register(self, record: WorkerRecord) -> Lease: ...
    def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]: ...
    async def close(self) -> None: ...

"""A request plane and a discovery inside one process, for tests. They behave; they move no bytes.

hub = MemoryHub()
worker = MemoryPlane(hub, peer_id="w0", on_message=..., on_lost=...)
hub.cut(worker.address)             # every connection of the worker is lost, at both ends
hub.drop(worker.address)            # messages to and from it vanish without a word
hub.pause(worker.address)           # whoever sends to it sees write_paused
discovery = MemoryDiscovery()       # share one object; discovery.kill("w0") is an owner's death
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from trtllm_workers.errors import AuthenticationFailed, ConfigError, PeerLost, StaleIncarnation
from trtllm_workers.planes.base import OnLost, OnMessage
from trtllm_workers.planes.frames import encode
from trtllm_workers.planes.mesh import new_incarnation
from trtllm_workers.planes.messages import Message, Ping, Pong
from trtllm_workers.types import Address, WorkerRecord


class MemoryHub:
    """What planes have in common: who listens where, and what is wrong with the network."""

    def __init__(self) -> None:
        self.planes: dict[int, MemoryPlane] = {}
        self.dropped: set[tuple[str, str]] = set()
        self.paused: set[tuple[str, str]] = set()

    def cut(self, address: Address, reason: str = "the connection was cut") -> None:
        """Lose every connection of the process at ``address``."""
        for plane in list(self.planes.values()):
            for link in list(plane.links):
                if _key(address) in (_key(plane.address), _key(link.address)):
                    link.lose(reason)

    def drop(self, address: Address) -> None:
        """Let messages to and from a process vanish until ``heal``."""
        self.dropped.add(_key(address))

    def pause(self, address: Address) -> None:
        """Let a process read slowly: senders see write_paused until ``heal``."""
        self.paused.add(_key(address))

    def heal(self) -> None:
        """End every drop and pause."""
        self.dropped.clear()
        self.paused.clear()


class MemoryPeer:
    """Implements Peer: one end of a connection between two planes of a hub."""

    def __init__(self, plane: MemoryPlane, other: MemoryPlane) -> None:
        self._plane = plane
        self._other = other
        self.twin: MemoryPeer | None = None
        self.lost: PeerLost | None = None
        self.sent: list[Message] = []

    def __repr__(self) -> str:
        return f"<MemoryPeer {self._plane.address.peer_id} to {self.address.peer_id}>"

    @property
    def address(self) -> Address:
        return self._other.address

    @property
    def write_paused(self) -> bool:
        return _key(self.address) in self._plane.hub.paused

    def send(self, message: Message) -> None:
        if self.lost is not None:
            raise PeerLost(str(self.lost))
        encode(message)  # what no frame can carry fails here too
        self.sent.append(message)
        if not self._plane.hub.dropped & {_key(self.address), _key(self._plane.address)}:
            asyncio.get_running_loop().call_soon(self._deliver, message)

    def _deliver(self, message: Message) -> None:
        twin = self.twin
        if twin is None or twin.lost is not None:
            return
        if isinstance(message, Ping):
            if self.lost is None:
                twin.send(Pong(message.number))
        elif not isinstance(message, Pong):
            try:
                self._other.on_message(twin, message)
            except Exception as error:  # noqa: BLE001 - the contract: it closes this connection only
                self.lose(f"a message could not be handled: {error!r}")

    def lose(self, reason: str) -> None:
        """End the connection at both ends; each is told in a later loop iteration."""
        for end in (self, self.twin):
            if end is not None and end.lost is None:
                end.lost = PeerLost(f"{end.address}: {reason}")
                end._plane.links.remove(end)
                asyncio.get_running_loop().call_soon(end._plane.on_lost, end, end.lost)


class MemoryPlane:
    """Implements RequestPlane among the planes of one hub, in one event loop."""

    def __init__(
        self,
        hub: MemoryHub,
        *,
        peer_id: str,
        on_message: OnMessage,
        on_lost: OnLost,
        incarnation: str | None = None,
        secret: bytes = b"secret",
        port: int = 0,
    ) -> None:
        self.hub = hub
        self.on_message = on_message
        self.on_lost = on_lost
        self.links: list[MemoryPeer] = []
        self._secret = secret
        self._port = port
        self._peer_id = peer_id
        self._incarnation = incarnation or new_incarnation()
        self._closed = False

    @property
    def address(self) -> Address:
        return Address("memory", self._port, self._peer_id, self._incarnation)

    async def start(self) -> None:
        taken = self.hub.planes
        self._port = self._port or max(taken, default=0) + 1
        if self._port in taken:
            raise ConfigError(f"port {self._port} is taken")
        taken[self._port] = self

    async def connect(self, address: Address, timeout_s: float = 5.0) -> MemoryPeer:
        live = self.peer(address)
        if live is not None:
            return live
        await asyncio.sleep(0)  # as a real one: others run before the answer
        other = self.hub.planes.get(address.port)
        if other is None or self._closed:
            raise PeerLost(f"nobody answers at {address}")
        if _key(address) in self.hub.dropped:
            await asyncio.sleep(timeout_s)
            raise PeerLost(f"{address} did not answer within {timeout_s:g} s")
        if other._secret != self._secret:
            raise AuthenticationFailed(f"{address} does not hold the same cluster secret")
        if _key(other.address) != _key(address):
            raise StaleIncarnation(
                f"wanted {address} of incarnation {address.incarnation}, found {other.address} of "
                f"incarnation {other.address.incarnation}"
            )
        live = self.peer(address)  # a concurrent connect may have been faster
        if live is not None:
            return live
        mine, theirs = MemoryPeer(self, other), MemoryPeer(other, self)
        mine.twin, theirs.twin = theirs, mine
        self.links.append(mine)
        other.links.append(theirs)
        return mine

    def peer(self, address: Address) -> MemoryPeer | None:
        for link in self.links:
            if _key(link.address) == _key(address):
                return link
        return None

    def peers(self) -> list[MemoryPeer]:
        return list({_key(link.address): link for link in reversed(self.links)}.values())

    async def close(self) -> None:
        self._closed = True
        self.hub.planes.pop(self._port, None)
        await asyncio.sleep(0)  # what was sent before arrives
        for link in list(self.links):
            link.lose("closed")
        await asyncio.sleep(0)  # on_lost runs before close returns


class MemoryDiscovery:
    """Implements Discovery inside one process: share the object between those who should meet."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], WorkerRecord] = {}
        self._changed = asyncio.Event()
        self._version = 1
        self._closed = False

    async def register(self, record: WorkerRecord) -> MemoryLease:
        self.put(record)
        return MemoryLease(self, record)

    async def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        seen_version = 0
        while not self._closed:
            changed = self._changed
            if self._version != seen_version:
                seen_version = self._version
                yield self.live()
            else:
                await changed.wait()

    async def close(self) -> None:
        self._closed = True
        self._records.clear()
        self._tell()

    def live(self) -> tuple[WorkerRecord, ...]:
        """Return the live records now: the youngest life of each worker, sorted by worker_id."""
        youngest = {record.worker_id: record for _, record in sorted(self._records.items())}
        return tuple(youngest.values())

    def put(self, record: WorkerRecord) -> None:
        """Add or replace one life's record."""
        self._records[record.worker_id, record.address.incarnation] = record
        self._tell()

    def kill(self, worker_id: str) -> None:
        """Let every record of a worker vanish, as if its owner had died."""
        for key in [key for key in self._records if key[0] == worker_id]:
            del self._records[key]
        self._tell()

    def remove(self, record: WorkerRecord) -> None:
        """Remove one life's record; one that is not there is fine."""
        if self._records.pop((record.worker_id, record.address.incarnation), None) is not None:
            self._tell()

    def _tell(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


class MemoryLease:
    """Implements Lease."""

    def __init__(self, discovery: MemoryDiscovery, record: WorkerRecord) -> None:
        self._discovery = discovery
        self._record = record
        self._closed = False

    async def update(self, record: WorkerRecord) -> None:
        for live in self._discovery.live():
            if live.worker_id == record.worker_id:
                younger = live.address.incarnation
                if younger > self._record.address.incarnation:
                    raise ConfigError(
                        f"worker {record.worker_id} lives on as incarnation {younger}; this older "
                        f"one ({self._record.address.incarnation}) must end"
                    )
        self._discovery.put(record)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._discovery.remove(self._record)


def _key(address: Address) -> tuple[str, str]:
    return address.peer_id, address.incarnation

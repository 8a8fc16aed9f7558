"""What the suites of the request plane and of discovery need: endpoints that note what happens."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar, cast

from tests.fakes.planes import MemoryHub, MemoryPlane
from trtllm_workers.config.outside import TlsFiles
from trtllm_workers.errors import PeerLost
from trtllm_workers.planes.base import Discovery, OnLost, OnMessage, Peer, RequestPlane
from trtllm_workers.planes.connection import Connection
from trtllm_workers.planes.mesh import TcpMesh
from trtllm_workers.planes.messages import Drain, Message
from trtllm_workers.types import (
    Address,
    EngineInfo,
    Role,
    WorkerRecord,
)

DEADLINE_S = 10.0
SECRET = b"of this cluster"
T = TypeVar("T")


async def soon(awaitable: Awaitable[T]) -> T:
    """Await with the tests' deadline."""
    async with asyncio.timeout(DEADLINE_S):
        return await awaitable


class Endpoint:
    """A started plane, and what came to it. ``on_drain`` runs for each Drain, for misbehaviour."""

    def __init__(self) -> None:
        self.received: list[tuple[Peer, Message]] = []
        self.lost: list[tuple[Peer, PeerLost]] = []
        self.on_drain: Callable[[Peer, Drain], None] = lambda _peer, _drain: None
        self._happened = asyncio.Event()
        self.plane: RequestPlane = cast("RequestPlane", None)

    @property
    def address(self) -> Address:
        return self.plane.address

    def words(self) -> list[str]:
        """Return the reasons of the Drain messages that came, which the tests use as text."""
        return [message.reason for _, message in self.received if isinstance(message, Drain)]

    def on_message(self, peer: Peer, message: Message) -> None:
        self.received.append((peer, message))
        self._happened.set()
        if isinstance(message, Drain):
            self.on_drain(peer, message)

    def on_lost(self, peer: Peer, error: PeerLost) -> None:
        self.lost.append((peer, error))
        self._happened.set()

    async def until(self, met: Callable[[], object]) -> None:
        """Wait until something happened here after which ``met`` is true."""
        async with asyncio.timeout(DEADLINE_S):
            while not met():
                self._happened.clear()
                await self._happened.wait()


class Net(Protocol):
    """One implementation of the request plane under test."""

    async def endpoint(
        self, peer_id: str, *, incarnation: str = "1", secret: bytes = SECRET, port: int = 0
    ) -> Endpoint: ...

    def stop_reading(self, endpoint: Endpoint) -> None:
        """Let an endpoint take nothing from its connections any more."""

    def cut(self, endpoint: Endpoint) -> None:
        """Break every connection of an endpoint without a word."""

    async def close(self) -> None: ...


class _Endpoints:
    def __init__(self) -> None:
        self._made: list[Endpoint] = []

    async def _start(self, build: Callable[[OnMessage, OnLost], RequestPlane]) -> Endpoint:
        endpoint = Endpoint()
        endpoint.plane = build(endpoint.on_message, endpoint.on_lost)
        await soon(endpoint.plane.start())
        self._made.append(endpoint)
        return endpoint

    async def close(self) -> None:
        for endpoint in self._made:
            await soon(endpoint.plane.close())


class MemoryNet(_Endpoints):
    def __init__(self) -> None:
        super().__init__()
        self._hub = MemoryHub()

    async def endpoint(
        self, peer_id: str, *, incarnation: str = "1", secret: bytes = SECRET, port: int = 0
    ) -> Endpoint:
        return await self._start(
            lambda on_message, on_lost: MemoryPlane(
                self._hub,
                peer_id=peer_id,
                incarnation=incarnation,
                secret=secret,
                port=port,
                on_message=on_message,
                on_lost=on_lost,
            )
        )

    def stop_reading(self, endpoint: Endpoint) -> None:
        self._hub.pause(endpoint.address)

    def cut(self, endpoint: Endpoint) -> None:
        self._hub.cut(endpoint.address)


class TcpNet(_Endpoints):
    def __init__(self, tls: TlsFiles | None = None, **settings: float) -> None:
        super().__init__()
        self.tls = tls
        self._settings = settings

    async def endpoint(
        self, peer_id: str, *, incarnation: str = "1", secret: bytes = SECRET, port: int = 0
    ) -> Endpoint:
        return await self._start(
            lambda on_message, on_lost: TcpMesh(
                peer_id=peer_id,
                incarnation=incarnation,
                secret=secret,
                port=port,
                on_message=on_message,
                on_lost=on_lost,
                tls=self.tls,
                **self._settings,  # type: ignore[arg-type]  # ping times and buffer sizes
            )
        )

    # A test stands in for the kernel here, so it reaches for what no user may touch.

    def stop_reading(self, endpoint: Endpoint) -> None:
        for connection in _connections(endpoint):
            cast("asyncio.Transport", connection._transport).pause_reading()

    def cut(self, endpoint: Endpoint) -> None:
        for connection in _connections(endpoint):
            cast("asyncio.Transport", connection._transport).abort()


def _connections(endpoint: Endpoint) -> list[Connection]:
    return list(cast("TcpMesh", endpoint.plane)._connections)


NETS: dict[str, Callable[[], Net]] = {"memory": MemoryNet, "tcp": TcpNet}
ENCRYPTED_NET = "tls"

ENGINE = EngineInfo(
    engine="sim",
    model_path="/models/demo",
    model_id="demo",
    block_size=32,
    num_blocks=64,
    max_seq_len=2048,
    max_batch_size=8,
    max_num_tokens=512,
    vocab_size=1000,
)
_incarnations = itertools.count(1)


def record(worker_id: str, *, incarnation: str | None = None, model: str = "demo") -> WorkerRecord:
    """Return a worker record; without an incarnation it is younger than all before."""
    life = incarnation or f"{next(_incarnations):08}"
    return WorkerRecord(
        worker_id=worker_id,
        model=model,
        role=Role.AGGREGATED,
        address=Address("127.0.0.1", 7000, worker_id, life),
        engine=ENGINE,
    )


@contextlib.asynccontextmanager
async def watching(discovery: Discovery) -> AsyncIterator[AsyncIterator[tuple[WorkerRecord, ...]]]:
    watch = discovery.watch()
    try:
        yield watch
    finally:
        await cast("AsyncIterator[object]", watch).aclose()  # type: ignore[attr-defined]  # a generator


async def seen(
    watch: AsyncIterator[tuple[WorkerRecord, ...]], *records: WorkerRecord
) -> list[tuple[WorkerRecord, ...]]:
    """Wait until the watch yields exactly these records; return all that it yielded."""
    yielded: list[tuple[WorkerRecord, ...]] = []
    while not yielded or yielded[-1] != records:
        yielded.append(await soon(anext(watch)))
    return yielded

"""Processes that register at a real etcd and watch it, and a way to etcd that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, Final, cast

from tests.contract.etcd import EtcdServer, free_ports
from tests.contract.planes import soon
from trtllm_workers.config.outside import EtcdLogin, EtcdUrl
from trtllm_workers.planes.discovery_etcd import EtcdDiscovery
from trtllm_workers.types import WorkerRecord

TTL_S: Final = 1.0  # etcd counts in whole seconds
LONGER_THAN_A_LEASE_S: Final = 1.8  # etcd looks for leases that have run out every half second


class Processes:
    """Discovery as several processes see it; all are closed in the end."""

    def __init__(self) -> None:
        self._made: list[EtcdDiscovery] = []

    def one(
        self,
        *urls: EtcdUrl,
        namespace: str = "default",
        connect_timeout_s: float = 5.0,
        ttl_s: float = TTL_S,
        **login: Any,
    ) -> EtcdDiscovery:
        url = EtcdUrl(tuple(each.endpoints[0] for each in urls), urls[0].tls)
        made = EtcdDiscovery(
            url, namespace, EtcdLogin(**login), ttl_s=ttl_s, connect_timeout_s=connect_timeout_s
        )
        self._made.append(made)
        return made

    async def close(self) -> None:
        await soon(asyncio.gather(*(each.close() for each in self._made)))


class Follower:
    """Reads a watch in the background and keeps every set that it yielded."""

    def __init__(self) -> None:
        self.sets: list[tuple[WorkerRecord, ...]] = []
        self.moments: list[float] = []
        self._more = asyncio.Event()

    async def read(self, discovery: EtcdDiscovery) -> None:
        async for records in discovery.watch():
            self.sets.append(records)
            self.moments.append(time.monotonic())
            self._more.set()

    async def until(self, *records: WorkerRecord) -> None:
        async def wait() -> None:
            while not self.sets or self.sets[-1] != records:
                self._more.clear()
                await self._more.wait()

        await soon(wait())

    async def stays(self, *records: WorkerRecord, for_s: float = LONGER_THAN_A_LEASE_S) -> None:
        """Check that this is the set, and that no other one comes for so long."""
        assert self.sets[-1] == records
        self._more.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                await self._more.wait()
        assert self.sets[-1] == records


@contextlib.asynccontextmanager
async def following(discovery: EtcdDiscovery, *begin: WorkerRecord) -> AsyncIterator[Follower]:
    follower = Follower()
    reading = asyncio.create_task(follower.read(discovery))
    try:
        await follower.until(*begin)
        yield follower
    finally:
        reading.cancel()
        await asyncio.wait({reading})


class Relay:
    """A way to etcd that can be cut."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._listening: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        (self.port,) = free_ports(1)
        self.url = EtcdUrl((("127.0.0.1", self.port),), tls=False)

    async def open(self) -> None:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Break every connection; nobody listens any more."""
        assert self._listening is not None
        self._listening.close()
        for writer in self._writers:
            writer.transport.abort()
        if self._tasks:
            await soon(asyncio.wait(self._tasks))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers |= {writer, back}
        try:
            await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))
        finally:
            self._writers -= {writer, back}
            self._tasks.discard(task)
            writer.close()
            back.close()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(65536):
            sink.write(piece)
        sink.close()

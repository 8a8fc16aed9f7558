"""Workers that take images, in one event loop: real meshes and transports, and gates to hold a read. Holds no test."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.worker.cluster import Cluster, Node, cluster
from tests.unit.worker.media_stage import (
    ROW_BYTES,
    Loads,
    Sighted,
    flat,
    image_rows,
    make_store,
    pattern,
    reference,
    until,
)
from trtllm_workers.engines.base import Engine
from trtllm_workers.planes.media_messages import (
    EncodeAsk,
    EncodeDone,
)
from trtllm_workers.transfer.base import KvLink, KvTransport
from trtllm_workers.types import FinishReason, MediaItem, Role, TransportCard

TRANSPORTS = [
    "tcp",
    pytest.param(
        "ucx",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"
        ),
    ),
    pytest.param(
        "nixl",
        marks=pytest.mark.skipif(
            not any(map(importlib.util.find_spec, ("nixl_cu12", "nixl_cu13"))),
            reason="nixl is not installed",
        ),
    ),
]
CAT, DOG = "image:cat:16x16", "rows:dog:7"
CONTENTS = [image_rows("cat", 16, 16), pattern(b"dog\0", 7 * ROW_BYTES)]


class Stage:
    """Workers that take images, and an ingress that asks for items."""

    def __init__(self, made: Cluster) -> None:
        self.made = made
        self.loads = Loads()
        self._asks = itertools.count(1)
        self.asks: dict[int, str] = {}

    async def add(self, role: Role, worker_id: str, **options: Any) -> Node:
        store = options.pop("store", None)

        def wrap(engine: Engine) -> Engine:
            sighted = Sighted(engine, blind=role is Role.DECODE)
            sighted.media_store = store or make_store()
            return sighted

        return await self.made.add(
            role, worker_id, wrap=wrap, loads=self.loads, max_num_tokens=512, **options
        )

    def ask(self, worker_id: str, *urls: str) -> int:
        number = next(self._asks)
        self.asks[number] = worker_id
        references = [reference(url, at) for at, url in enumerate(urls)]
        self._peer(worker_id).send(EncodeAsk(number, references, 20.0))
        return number

    async def items(self, worker_id: str, *urls: str) -> list[MediaItem]:
        number = self.ask(worker_id, *urls)
        await self.made.client.until(lambda: number in self.made.client.encoded)
        return flat(self.made.client.encoded[number])

    def _peer(self, worker_id: str) -> Any:
        peer = self.made.client.mesh.peer(self.made.nodes[worker_id].mesh.address)
        assert peer is not None
        return peer

    def all_done(self) -> None:
        """Say that no item is needed any more."""
        for number, worker_id in self.asks.items():
            if worker_id in self.made.nodes:
                self._peer(worker_id).send(EncodeDone(number))
        self.asks.clear()

    async def failure(self, stream: int) -> tuple[str, str]:
        await self.made.client.until(lambda: stream in self.made.client.last)
        last = self.made.client.last[stream]
        assert last.finish_reason is FinishReason.ERROR, last
        return last.error_code or "", last.error_message or ""

    async def aborted(self, stream: int) -> None:
        await self.made.client.until(lambda: stream in self.made.client.last)
        assert self.made.client.last[stream].finish_reason is FinishReason.ABORT

    async def settled(self) -> None:
        """Wait until nobody holds anything, of images or of KV."""
        self.all_done()
        await self.made.idle()
        for node in self.made.nodes.values():
            await at_rest(node)
            _, _, encodes = parts(node)
            assert encodes is None or encodes.num_open == 0
            assert engine_of(node).num_pinned == 0
            assert node.service.num_streams == 0


def parts(node: Node) -> Any:
    return node.engine.media_store, node.service.media, node.service.encodes


async def at_rest(node: Node) -> None:
    """Wait until no image here is held, filled, read or fetched."""
    store, media, _ = parts(node)
    await until(lambda: not store.num_pinned and not store.num_claimed_blocks)
    await until(lambda: not media.fetcher.num_open and not media.num_open)


def engine_of(node: Node) -> Any:
    return node.engine


def seen(node: Node) -> list[list[bytes]]:
    return [contents for _, contents in engine_of(node).seen]


def media_stats(node: Node) -> Any:
    return node.service.media_meters.stats(parts(node)[0])


@asynccontextmanager
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with cluster(tmp_path) as made:
        yield Stage(made)


class Gate:
    """Holds reads until it is opened, and tells that one has begun."""

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.open = asyncio.Event()
        self.num_links = 0
        self.num_closed = 0
        self.error: Exception | None = None

    def transport(self, inner: KvTransport) -> KvTransport:
        return _GatedTransport(inner, self)


class _GatedTransport:
    def __init__(self, inner: KvTransport, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate
        self.name = inner.name

    async def start(self, pool: Any) -> None:
        await self._inner.start(pool)

    def card(self) -> TransportCard:
        return self._inner.card()

    async def connect(self, card: TransportCard, timeout_s: float) -> KvLink:
        link = await self._inner.connect(card, timeout_s)
        self._gate.num_links += 1
        return _GatedLink(link, self._gate)  # type: ignore[return-value]

    async def close(self) -> None:
        await self._inner.close()


class _GatedLink:
    def __init__(self, inner: KvLink, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate
        self.peer_id, self.wire = inner.peer_id, inner.wire

    async def read(self, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> None:
        self._gate.reading.set()
        await self._gate.open.wait()
        if self._gate.error is not None:
            raise self._gate.error
        await self._inner.read(remote, local, timeout_s)

    async def close(self) -> None:
        self._gate.num_closed += 1
        await self._inner.close()


async def chain(on: Stage, **options: Any) -> None:
    await on.add(Role.ENCODE, "e0")
    await on.add(Role.AGGREGATED, "a0")
    await on.add(Role.PREFILL, "p0", **options)
    await on.add(Role.DECODE, "d0", **options)
    await on.made.paired("d0", "p0")

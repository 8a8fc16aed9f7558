"""Prefill and decode workers in one event loop: real meshes, engines and transports, no processes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.planes import MemoryDiscovery
from tests.fakes.tiny_models import make_tiny_checkpoint
from trtllm_workers.config.keys import EngineConfig, Setting, default_config
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.base import Engine, EngineOptions, generate
from trtllm_workers.engines.registry import KEYED_ENGINES, build_engine, engine_keys
from trtllm_workers.errors import PeerLost
from trtllm_workers.observe.status import StatusFile
from trtllm_workers.planes.base import Lease, Peer
from trtllm_workers.planes.frames import columns
from trtllm_workers.planes.media_messages import Encoded, EncodeFailed
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import Abort, Message, StatsAsk, Submit, Tokens, WorkerStats
from trtllm_workers.planes.queue import WorkQueue
from trtllm_workers.transfer.base import KvTransport
from trtllm_workers.transfer.registry import open_transport
from trtllm_workers.types import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    Role,
    SamplingParams,
    TokenChunk,
    WorkerRecord,
)
from trtllm_workers.worker.canary import Canary
from trtllm_workers.worker.ledger import Ledger
from trtllm_workers.worker.media_maker import Loader
from trtllm_workers.worker.media_parts import join_media, open_media_transports
from trtllm_workers.worker.pairing import owned_by, start_pairs
from trtllm_workers.worker.pairs import READY
from trtllm_workers.worker.prefill_desk import HandoffLimits
from trtllm_workers.worker.queue_end import join_queue
from trtllm_workers.worker.queued_prefill import FenceTimes
from trtllm_workers.worker.service import WorkerService

DEADLINE_S = 20.0
# Of the prefill queue in these tests; nobody here dies in the middle of a write that goes on.
ACK_WAIT_S = 0.3
FAST_FENCE = FenceTimes(ended_s=0.05, silent_s=0.1, stop_s=5.0, lonely_s=0.6)
MODEL = "tiny"
SECRET = b"0123456789abcdef"
SMALL = {
    "max_batch_size": 16,
    "max_num_tokens": 64,
    "max_seq_len": 512,
    "kv_cache_config__tokens_per_block": 8,
    "kv_cache_config__max_tokens": 4096,
}


# What the launcher writes for the role, and what a tiny model on a CPU needs.
TRTLLM = {
    "enable_chunked_prefill": True,
    "enable_iter_perf_stats": True,
    "kv_cache_config__event_buffer_max_size": 1024,
    "cache_transceiver_config__backend": "UCX",
    "cache_transceiver_config__kv_transfer_timeout_ms": 5000,
}


def config_of(engine: str, **changes: Any) -> EngineConfig:
    if engine in KEYED_ENGINES:
        return default_config(engine, engine_keys(engine), **{**SMALL, **changes})
    given = {**SMALL, **TRTLLM, **changes}
    return EngineConfig(
        engine, {name.replace("__", "."): Setting(value, "test") for name, value in given.items()}
    )


@dataclass
class Node:
    """One worker."""

    worker_id: str
    role: Role
    engine: Engine
    info: EngineInfo
    service: WorkerService
    mesh: TcpMesh
    transports: list[KvTransport]
    record: WorkerRecord
    lease: Lease
    stack: AsyncExitStack
    canary: Canary | None

    @property
    def ledger(self) -> Ledger:
        return Ledger(
            self.engine, owned_by(self.service, self.canary), self.service.meters, grace_s=0.0
        )

    @property
    def held_blocks(self) -> int:
        stats = self.engine.stats()
        return stats.allocated_blocks - stats.freed_blocks

    def fallbacks(self) -> dict[str, int]:
        return dict(self.service.meters.counts().fallbacks)

    def ended(self) -> dict[tuple[str, str], int]:
        ended = self.service.meters.counts().ended
        return {(state, cause): count for state, cause, count in ended}


@dataclass
class Client:
    """An ingress as workers see it."""

    mesh: TcpMesh
    tokens: dict[int, list[int]] = field(default_factory=dict)
    last: dict[int, TokenChunk] = field(default_factory=dict)
    stats: dict[str, WorkerStats] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    encoded: dict[int, Encoded | EncodeFailed] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def on_message(self, _peer: Peer, message: Message) -> None:
        if isinstance(message, WorkerStats):
            self.stats[message.worker_id] = message
        elif isinstance(message, Encoded | EncodeFailed):
            self.encoded[message.ask] = message
        elif isinstance(message, Tokens):
            for stream, token in zip(*columns(message), strict=True):
                self.tokens.setdefault(stream, []).append(token)
            for stream, chunk in message.rich:
                self.tokens.setdefault(stream, []).extend(chunk.token_ids)
                if chunk.finish_reason is not None:
                    assert stream not in self.last, "a stream ended twice"
                    self.last[stream] = chunk
        self.news.set()

    def on_lost(self, peer: Peer, _error: PeerLost) -> None:
        self.lost.append(peer.address.peer_id)
        self.news.set()

    async def happened(self) -> None:
        """Wait until something arrives."""
        self.news.clear()
        async with asyncio.timeout(DEADLINE_S):
            await self.news.wait()

    async def until(self, met: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not met():
                self.news.clear()
                await self.news.wait()


class Cluster:
    """Workers that find each other. Ends what it started."""

    def __init__(self, folder: Path, engine: str, transport: str, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.engine = engine
        self.transport = transport
        self.discovery = MemoryDiscovery()
        self.nodes: dict[str, Node] = {}
        self.client: Client
        self.after_message: Callable[[Message], None] = lambda _message: None
        self._stack = stack

    async def add(
        self,
        role: Role,
        worker_id: str,
        *,
        model_path: Path | None = None,
        max_local: int = 0,
        limits: HandoffLimits = HandoffLimits(),  # noqa: B008 - frozen
        canary_interval_s: float = 0.0,
        wrap: Callable[[Engine], Engine] = lambda engine: engine,
        extra: dict[str, str] | None = None,
        queue: WorkQueue | None = None,
        fence: FenceTimes = FAST_FENCE,
        transport: str | None = None,
        loads: Loader | None = None,
        media_transport: str = "tcp",
        wrap_media: Callable[[KvTransport], KvTransport] = lambda one: one,
        **config: Any,
    ) -> Node:
        """Start one worker and let it register."""
        stack = AsyncExitStack()
        await self._stack.enter_async_context(stack)
        options = EngineOptions(
            model_path=model_path or self.folder,
            config=config_of(self.engine, **config),
            extra={"role": str(role), **(extra or {})} if self.engine == "trtllm" else extra or {},
        )
        engine = wrap(build_engine(self.engine, options))
        stack.push_async_callback(engine.close)
        info = await engine.start()
        transports: list[KvTransport] = []
        for name in (transport or self.transport).split(","):
            if role not in (Role.PREFILL, Role.DECODE) or engine.kv_pool is None:
                break
            kv_transport = open_transport(
                name,
                peer_id=worker_id,
                host="127.0.0.1",
                on_notify=lambda _peer, _message: None,
            )
            await kv_transport.start(engine.kv_pool)
            transports.append(kv_transport)
            stack.push_async_callback(kv_transport.close)
        service = WorkerService(worker_id, role, engine, limits=limits)

        def on_message(peer: Peer, message: Message) -> None:
            service.on_message(peer, message)
            self.after_message(message)

        mesh = TcpMesh(
            peer_id=worker_id,
            incarnation=new_incarnation(),
            secret=SECRET,
            on_message=on_message,
            on_lost=service.on_lost,
        )
        await mesh.start()
        stack.push_async_callback(mesh.close)
        service.attach(mesh, info, transports, max_local_prefill_length=max_local)
        stack.push_async_callback(service.close)
        if loads is not None:
            moving = await open_media_transports(
                media_transport, role, engine, info, worker_id=worker_id, host="127.0.0.1"
            )
            for one in moving:
                stack.push_async_callback(one.close)
            stack.push_async_callback(service.close)  # before they are
            join_media(
                service,
                worker_id,
                engine,
                info,
                mesh,
                [wrap_media(one) for one in moving],
                MediaSettings(),
                limits,
                loads,
            )
        if queue is not None:
            join_queue(
                service,
                queue,
                role,
                mesh,
                engine,
                info,
                transports,
                prefill_timeout_s=limits.prefill_timeout_s,
                fence=fence,
                ack_wait_s=ACK_WAIT_S,
            )
        record = WorkerRecord(
            worker_id=worker_id, model=MODEL, role=role, address=mesh.address, engine=info
        )
        lease = await self.discovery.register(record)
        canary: Canary | None = None
        if role is Role.DECODE:
            canary = await start_pairs(
                service,
                engine,
                info,
                mesh,
                self.discovery,
                transports,
                StatusFile(None),
                stack,
                worker_id=worker_id,
                model=MODEL,
                canary_interval_s=canary_interval_s,
            )
        node = Node(
            worker_id, role, engine, info, service, mesh, transports, record, lease, stack, canary
        )
        self.nodes[worker_id] = node
        peer = await self.client.mesh.connect(mesh.address)
        peer.send(StatsAsk())
        return node

    async def paired(self, decode: str, prefill: str, state: str = READY) -> None:
        """Wait until a pair has reached a state."""

        def there() -> bool:
            stats = self.client.stats.get(decode)
            pairs = stats.pairs if stats is not None else []
            return any(p.peer.peer_id == prefill and p.state == state for p in pairs)

        await self.client.until(there)

    async def kill(self, worker_id: str) -> None:
        """Let a worker vanish: its connections end, its record goes."""
        node = self.nodes.pop(worker_id)
        self.discovery.kill(worker_id)
        await node.mesh.close()
        await node.stack.aclose()

    def submit(self, request: GenerateRequest, first: str, decode: str | None = None) -> int:
        """Send a request; return its stream's number."""
        stream: int = next(self.client.numbers)
        peer = self.client.mesh.peer(self.nodes[first].mesh.address)
        assert peer is not None
        to = self.nodes[decode].mesh.address if decode is not None else None
        peer.send(Submit(stream, request, self.client.mesh.address, to))
        return stream

    def abort(self, stream: int, *worker_ids: str) -> None:
        """Send an abort to these workers, those that are there."""
        for worker_id in worker_ids:
            if worker_id in self.nodes:
                peer = self.client.mesh.peer(self.nodes[worker_id].mesh.address)
                if peer is not None:
                    peer.send(Abort([stream], self.client.mesh.address))

    async def answer(self, stream: int) -> list[int]:
        """Return a stream's tokens; it must end well."""
        await self.client.until(lambda: stream in self.client.last)
        last = self.client.last[stream]
        assert last.finish_reason in (FinishReason.LENGTH, FinishReason.STOP), last
        return self.client.tokens.get(stream, [])

    async def expected(self, request: GenerateRequest, node: str) -> list[int]:
        """Return what an aggregated run gives, on a worker's own engine."""
        tokens: list[int] = []
        async for chunk in generate(self.nodes[node].engine, request):
            tokens += chunk.token_ids
        return tokens

    async def idle(self) -> None:
        """Wait until no worker holds a block; fails when some stay."""
        for node in self.nodes.values():
            async with asyncio.timeout(DEADLINE_S):
                while await node.engine.holdings():  # noqa: ASYNC110 - a count
                    await asyncio.sleep(0)
            assert await node.ledger.check() == {}


@asynccontextmanager
async def cluster(
    tmp_path: Path, engine: str = "sim", transport: str = "tcp", **checkpoint: Any
) -> AsyncIterator[Cluster]:
    """Yield an empty cluster over a tiny model."""
    folder = make_tiny_checkpoint(tmp_path / "model", **checkpoint)
    async with AsyncExitStack() as stack:
        made = Cluster(folder, engine, transport, stack)
        box: list[Client] = []
        mesh = TcpMesh(
            peer_id="ingress",
            incarnation=new_incarnation(),
            secret=SECRET,
            on_message=lambda peer, message: box[0].on_message(peer, message),
            on_lost=lambda peer, error: box[0].on_lost(peer, error),
        )
        made.client = Client(mesh)
        box.append(made.client)
        await mesh.start()
        stack.push_async_callback(mesh.close)
        yield made
        for node in made.nodes.values():
            await node.stack.aclose()


def request(prompt: list[int], max_tokens: int = 12, **sampling: Any) -> GenerateRequest:
    sampling = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )


def prompt_of(number: int, length: int) -> list[int]:
    return [5 + (number * 131 + 17 * i + i * i) % 480 for i in range(length)]

"""A worker's desk over real loopback connections, with the sim engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.tiny_models import make_tiny_checkpoint
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.engines.registry import build_engine, engine_keys
from trtllm_workers.errors import PeerLost
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.frames import columns
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import (
    Abort,
    Drain,
    Message,
    StatsAsk,
    Submit,
    Tokens,
    WorkerStats,
)
from trtllm_workers.types import (
    Address,
    FinishReason,
    GenerateRequest,
    Role,
    SamplingParams,
    TokenChunk,
)
from trtllm_workers.worker.service import WorkerService

DEADLINE_S = 10.0
STEP_MS = 5


@dataclass
class FakeIngress:
    """The ingress's side of the mesh: keeps what arrives, per stream."""

    mesh: TcpMesh
    frames: list[Tokens] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    last: dict[int, TokenChunk] = field(default_factory=dict)
    others: list[Message] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def on_message(self, _peer: Peer, message: Message) -> None:
        self.news.set()
        if not isinstance(message, Tokens):
            self.others.append(message)
            return
        self.frames.append(message)
        for stream, token in zip(*columns(message), strict=True):
            self.tokens.setdefault(stream, []).append(token)
        for stream, chunk in message.rich:
            self.tokens.setdefault(stream, []).extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                assert stream not in self.last, "a stream ended twice"
                self.last[stream] = chunk

    async def until(self, condition: object) -> None:
        """Wait until ``condition()`` is true; it is looked at after each message."""
        assert callable(condition)
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                self.news.clear()
                await self.news.wait()

    def submit(self, peer: Peer, stream: int, **changes: Any) -> None:
        peer.send(Submit(stream, request(**changes), self.mesh.address))


def request(
    request_id: str = "same id", max_tokens: int = 8, prompt: int = 20, **sampling: Any
) -> GenerateRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, **sampling)
    return GenerateRequest(
        request_id=request_id, prompt_token_ids=list(range(5, 5 + prompt)), sampling=params
    )


@dataclass
class Stack:
    engine: Engine
    service: WorkerService
    mesh: TcpMesh

    @asynccontextmanager
    async def ingress(self, name: str = "ingress") -> AsyncIterator[tuple[FakeIngress, Peer]]:
        box: list[FakeIngress] = []

        def on_lost(_peer: Peer, _error: PeerLost) -> None:
            box[0].news.set()

        mesh = TcpMesh(
            peer_id=name,
            incarnation=new_incarnation(),
            secret=b"0123456789abcdef",
            on_message=lambda peer, message: box[0].on_message(peer, message),
            on_lost=on_lost,
        )
        box.append(FakeIngress(mesh))
        await mesh.start()
        try:
            yield box[0], await mesh.connect(self.mesh.address)
        finally:
            await mesh.close()


@asynccontextmanager
async def worker(tmp_path: Path) -> AsyncIterator[Stack]:
    cost = tmp_path / "cost.yaml"
    cost.write_text(f"decode:\n  base_ms: {STEP_MS}\n")
    engine = build_engine(
        "sim",
        EngineOptions(
            model_path=make_tiny_checkpoint(tmp_path / "model"),
            config=default_config("sim", engine_keys("sim")),
            extra={"cost_path": str(cost)},
        ),
    )
    service = WorkerService("w0", Role.AGGREGATED, engine)
    mesh = TcpMesh(
        peer_id="w0",
        incarnation=new_incarnation(),
        secret=b"0123456789abcdef",
        on_message=service.on_message,
        on_lost=service.on_lost,
    )
    await engine.start()
    await mesh.start()
    service.attach(mesh)
    try:
        yield Stack(engine, service, mesh)
    finally:
        await engine.close()
        await service.close()
        await mesh.close()


async def test_a_step_of_many_streams_is_one_frame(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        for stream in range(32):
            ingress.submit(peer, stream, max_tokens=20)
        await ingress.until(lambda: len(ingress.last) == 32)
        steps = stack.engine.stats().num_steps
        assert all(len(tokens) == 20 for tokens in ingress.tokens.values())
        assert len(ingress.frames) <= steps


async def test_answers_carry_why_they_ended(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        ingress.submit(peer, 1)
        await ingress.until(lambda: 1 in ingress.last)
        assert ingress.last[1].finish_reason is FinishReason.LENGTH
        assert stack.service.num_streams == 0


async def test_a_refused_request_names_code_and_field_and_the_others_go_on(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        ingress.submit(peer, 1)
        ingress.submit(peer, 2, logprobs=3)
        ingress.submit(peer, 3, max_tokens=10**6)
        await ingress.until(lambda: len(ingress.last) == 3)
        assert ingress.last[1].finish_reason is FinishReason.LENGTH
        assert (ingress.last[2].error_code, ingress.last[2].error_param) == (
            "unsupported_parameter",
            "logprobs",
        )
        assert ingress.last[3].error_code == "context_length_exceeded"


async def test_equal_request_ids_of_two_ingresses_do_not_meet(tmp_path: Path) -> None:
    async with (
        worker(tmp_path) as stack,
        stack.ingress("a") as (first, to_first),
        stack.ingress("b") as (second, to_second),
    ):
        first.submit(to_first, 1, max_tokens=500)
        second.submit(to_second, 1, max_tokens=10)
        await first.until(lambda: len(first.tokens.get(1, ())) > 2)
        to_first.send(Abort([1], first.mesh.address))
        await first.until(lambda: 1 in first.last)
        await second.until(lambda: 1 in second.last)
        assert first.last[1].finish_reason is FinishReason.ABORT
        assert second.last[1].finish_reason is FinishReason.LENGTH
        assert len(second.tokens[1]) == 10


async def test_an_abort_frees_the_blocks_within_a_step(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        ingress.submit(peer, 7, max_tokens=1000)
        await ingress.until(lambda: len(ingress.tokens.get(7, ())) > 1)
        before = stack.engine.stats().num_steps
        peer.send(Abort([7, 8], ingress.mesh.address))
        await ingress.until(lambda: 7 in ingress.last)
        assert stack.engine.stats().active_blocks == 0
        assert stack.engine.stats().num_steps <= before + 2


async def test_a_lost_ingress_leaves_no_stream_behind(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack:
        async with stack.ingress() as (ingress, peer):
            for stream in range(8):
                ingress.submit(peer, stream, max_tokens=1000)
            await ingress.until(lambda: len(ingress.tokens) == 8)
        async with stack.ingress("probe") as (probe, to_probe):
            # The engine aborts at step boundaries; the probe's own answer passes several of them.
            probe.submit(to_probe, 1, max_tokens=4)
            await probe.until(lambda: 1 in probe.last)
        assert stack.service.num_streams == 0
        assert stack.engine.stats().active_blocks == 0


async def test_a_draining_worker_refuses_and_finishes_what_runs(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        ingress.submit(peer, 1, max_tokens=30)
        await ingress.until(lambda: 1 in ingress.tokens)
        stack.service.drain("it was told to stop")
        ingress.submit(peer, 2)
        await ingress.until(lambda: len(ingress.last) == 2)
        assert ingress.last[1].finish_reason is FinishReason.LENGTH
        assert ingress.last[2].error_code == "unavailable"
        assert "w0 is draining" in str(ingress.last[2].error_message)
        assert any(isinstance(message, Drain) for message in ingress.others)


async def test_the_load_is_told_to_those_who_asked(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        stack.service.publish_stats()
        peer.send(StatsAsk())
        await ingress.until(lambda: ingress.others)
        assert len(ingress.others) == 1
        ingress.submit(peer, 1, max_tokens=4)
        await ingress.until(lambda: 1 in ingress.last)
        stack.service.publish_stats()
        await ingress.until(lambda: len(ingress.others) == 2)
        told = ingress.others[-1]
        assert isinstance(told, WorkerStats)
        assert told.worker_id == "w0"
        assert told.stats.output_tokens == 4
        assert told.num_frames == len(ingress.frames)


async def test_an_unreachable_reply_address_aborts_its_streams(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        nobody = Address("127.0.0.1", 1, "nobody", "0")
        peer.send(Submit(1, request(max_tokens=1000), nobody))
        ingress.submit(peer, 2, max_tokens=100)
        await ingress.until(lambda: 2 in ingress.last)
        assert stack.service.num_streams == 0
        assert stack.engine.stats().active_blocks == 0

"""A whole worker of role encode, from its start to its end; and where it cannot be one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny_models import make_tiny_checkpoint
from tests.unit.worker.cluster import SECRET, Client, config_of
from tests.unit.worker.media_stage import VISION, Loads, Sighted, flat, reference, request_with
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.discovery import open_discovery
from trtllm_workers.planes.media_messages import EncodeAsk, EncodeDone, EncodeFailed
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import Submit
from trtllm_workers.types import FinishReason, Role, WorkerRecord
from trtllm_workers.worker import media_parts, serve
from trtllm_workers.worker.serve import WorkerSettings, serve_worker

DEADLINE_S = 20.0


@dataclass
class Running:
    client: Client
    peer: Peer
    record: WorkerRecord
    serving: asyncio.Task[None]
    options: EngineOptions
    engine: Sighted
    loads: Loads


def settings(tmp_path: Path, role: Role, **changes: Any) -> WorkerSettings:
    return WorkerSettings(
        worker_id="e0",
        model_path=make_tiny_checkpoint(tmp_path / "model"),
        served_model_name="tiny",
        engine="sim",
        engine_config=config_of("sim"),
        discovery=f"file://{tmp_path}/discovery",
        secret=SECRET,
        role=role,
        kv_transport="tcp",
        **changes,
    )


@asynccontextmanager
async def worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role, **changes: Any
) -> AsyncIterator[Running]:
    loads = Loads()
    built: list[tuple[EngineOptions, Sighted]] = []

    def build(name: str, options: EngineOptions) -> Engine:
        engine = Sighted(
            build_engine(name, options), blind=not options.encodes, mute=not options.generates
        )
        built.append((options, engine))
        return engine

    monkeypatch.setattr(serve, "build_engine", build)
    monkeypatch.setattr(media_parts, "_built_in", lambda _settings, _vision: loads)
    wanted = settings(tmp_path, role, **changes)
    box: list[Client] = []
    mesh = TcpMesh(
        peer_id="ingress",
        incarnation=new_incarnation(),
        secret=SECRET,
        on_message=lambda peer, message: box[0].on_message(peer, message),
        on_lost=lambda peer, error: box[0].on_lost(peer, error),
    )
    box.append(Client(mesh))
    await mesh.start()
    discovery = open_discovery(wanted.discovery)
    serving = asyncio.create_task(serve_worker(wanted))
    try:
        async with asyncio.timeout(DEADLINE_S):
            async for records in discovery.watch():
                if records:
                    break
        (record,) = records
        peer = await mesh.connect(record.address)
        yield Running(box[0], peer, record, serving, *built[0], loads)
    finally:
        await discovery.close()
        if not serving.done():
            serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await mesh.close()


async def test_an_encode_worker_makes_items_refuses_prompts_and_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(tmp_path, monkeypatch, Role.ENCODE, encodes=False) as it:
        assert it.record.role is Role.ENCODE
        assert it.record.engine.vision == VISION
        assert (it.options.encodes, it.options.generates) == (True, False)
        it.peer.send(EncodeAsk(1, [reference("image:cat:8x8")], DEADLINE_S))
        await it.client.until(lambda: 1 in it.client.encoded)
        (item,) = flat(it.client.encoded[1])
        assert item.holder == it.record.address

        it.peer.send(Submit(1, request_with([]), it.client.mesh.address))
        await it.client.until(lambda: 1 in it.client.last)
        assert it.client.last[1].finish_reason is FinishReason.ERROR

        it.peer.send(EncodeAsk(2, [reference("slow:rows:dog:4")], DEADLINE_S))
        async with asyncio.timeout(DEADLINE_S):
            while not it.loads.waiting:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
        number = 3
        while True:  # until it drains
            it.peer.send(EncodeAsk(number, [reference("rows:owl:4")], DEADLINE_S))
            await it.client.until(lambda number=number: number in it.client.encoded)  # type: ignore[misc]
            answer = it.client.encoded[number]
            if isinstance(answer, EncodeFailed):
                break
            it.peer.send(EncodeDone(number))
            number += 1
        assert answer.code == "unavailable"
        assert not it.serving.done()
        it.loads.gate.set()
        await it.client.until(lambda: 2 in it.client.encoded)
        assert len(flat(it.client.encoded[2])) == 1
        for ask in (1, 2):
            it.peer.send(EncodeDone(ask))
        async with asyncio.timeout(DEADLINE_S):
            await it.serving
        assert it.loads.closed


async def test_a_worker_that_does_not_encode_says_so_to_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(tmp_path, monkeypatch, Role.AGGREGATED, encodes=False) as it:
        vision = it.record.engine.vision
        assert vision is not None
        assert not vision.encodes
        it.peer.send(EncodeAsk(1, [reference("image:cat:8x8")], DEADLINE_S))
        await it.client.until(lambda: 1 in it.client.encoded)
        failed = it.client.encoded[1]
        assert isinstance(failed, EncodeFailed)
        assert failed.code == "unsupported_parameter"


async def test_a_model_of_text_cannot_have_encode_workers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model tiny .* takes text only; role encode needs"):
        async with asyncio.timeout(DEADLINE_S):
            await serve_worker(settings(tmp_path, Role.ENCODE))

"""The whole process in one: real sockets, a real mesh, discovery in a folder, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import engine_info
from trtllm_workers.errors import ConfigError, StartError
from trtllm_workers.ingress.ports import listen, port_owner
from trtllm_workers.ingress.serve import IngressSettings, serve_ingress
from trtllm_workers.observe.status import read_status
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.discovery import open_discovery
from trtllm_workers.planes.frames import TokenBatch
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import Abort, Message, Submit
from trtllm_workers.types import FinishReason, Role, TokenChunk, WorkerRecord

SECRET = b"s" * 32


class MeshWorker:
    """A worker on the real mesh that speaks when told to."""

    def __init__(self) -> None:
        self.submits: list[tuple[Peer, Submit]] = []
        self.aborted: list[int] = []
        self.changed = asyncio.Event()

    def on_message(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Submit):
            self.submits.append((peer, message))
        elif isinstance(message, Abort):
            self.aborted += message.streams
        self.changed.set()

    async def until_submits(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.submits) < count:
                self.changed.clear()
                await self.changed.wait()

    def say(self, at: int, token_ids: list[int], finish: FinishReason | None = None) -> None:
        peer, submit = self.submits[at]
        batch = TokenBatch()
        batch.add(submit.stream, TokenChunk(tuple(token_ids), finish), first=True)
        tokens = batch.take()
        assert tokens is not None
        peer.send(tokens)


@asynccontextmanager
async def running(
    tmp_path: Path, checkpoint: Path, **settings: Any
) -> AsyncIterator[tuple[str, MeshWorker, asyncio.Task[None]]]:
    """Run an ingress and one worker; yields the URL, the worker and the ingress's task."""
    worker = MeshWorker()
    mesh = TcpMesh(
        peer_id="w0",
        incarnation=new_incarnation(),
        secret=SECRET,
        on_message=worker.on_message,
        on_lost=lambda _peer, _error: None,
    )
    await mesh.start()
    url = f"file://{tmp_path}/discovery"
    discovery = open_discovery(url)
    await discovery.register(
        WorkerRecord(
            worker_id="w0",
            model="m",
            role=Role.AGGREGATED,
            address=mesh.address,
            engine=engine_info(checkpoint),
            started_at_s=time.time(),
        )
    )
    listening: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
    told = IngressSettings(
        discovery=url,
        secret=SECRET,
        http_port=0,
        status_file=tmp_path / "status.json",
        on_listening=lambda host, port: listening.set_result((host, port)),
        **settings,
    )
    serving = asyncio.create_task(serve_ingress(told))
    try:
        host, port = await asyncio.wait_for(listening, 10)
        yield f"http://{host}:{port}", worker, serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await discovery.close()
        await mesh.close()


async def until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.to_thread(time.sleep, 0.02)


BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


async def test_an_ingress_finds_its_worker_serves_and_drains_on_sigterm(
    tmp_path: Path, checkpoint: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode("Hello world").ids
    async with running(tmp_path, checkpoint) as (url, worker, serving):
        async with httpx.AsyncClient(base_url=url, timeout=10) as client:
            await until_ready(client)
            status = read_status(tmp_path / "status.json")
            assert status is not None
            assert (status.step, status.detail) == ("listening", url)
            asked = asyncio.create_task(client.post("/v1/chat/completions", json=BODY))
            await worker.until_submits(1)
            os.kill(os.getpid(), signal.SIGTERM)
            refused = await client.post("/v1/chat/completions", json=BODY)
            worker.say(0, token_ids, FinishReason.STOP)
            answered = await asked
        await asyncio.wait_for(serving, 10)
    assert refused.status_code == 503
    assert "SIGTERM was received" in refused.text
    assert answered.json()["choices"][0]["message"]["content"] == "Hello world"
    status = read_status(tmp_path / "status.json")
    assert status is not None
    assert status.step == "draining"


@pytest.mark.parametrize("how", ["deadline", "second signal"])
async def test_streams_that_outlast_the_drain_end_with_an_error_event_and_an_abort(
    tmp_path: Path, checkpoint: Path, tokenizer: Tokenizer, how: str
) -> None:
    drain_timeout_s = 0.1 if how == "deadline" else 60.0
    async with (
        running(tmp_path, checkpoint, drain_timeout_s=drain_timeout_s) as (url, worker, serving),
        httpx.AsyncClient(base_url=url, timeout=10) as client,
    ):
        await until_ready(client)
        body = {**BODY, "stream": True}

        async def first_token() -> None:
            await worker.until_submits(1)
            worker.say(0, tokenizer.encode("Hello").ids[:1])

        speaking = asyncio.create_task(first_token())
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            await speaking
            assert "assistant" in await anext(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            if how == "second signal":
                while (await client.get("/ready")).status_code != 503:
                    pass
                os.kill(os.getpid(), signal.SIGINT)
            rest = [line async for line in lines if line]
        assert "the ingress is stopping" in rest[-1]
        await asyncio.wait_for(serving, 10)
        assert worker.aborted == [worker.submits[0][1].stream]


def own_name() -> str:
    return Path("/proc/self/comm").read_text().strip()


async def test_a_taken_port_is_refused_with_its_owner(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = IngressSettings(discovery=f"file://{tmp_path}", secret=SECRET, http_port=port)
        with pytest.raises(StartError) as error:
            await serve_ingress(settings)
    assert str(error.value) == (
        f"port {port} is in use by pid {os.getpid()} ({own_name()}); "
        "choose another with --http-port (0 takes any free one)"
    )
    assert error.value.param == "http_port"


def test_an_owner_that_cannot_be_seen_is_left_out(tmp_path: Path) -> None:
    assert port_owner(1, tmp_path) == ""
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
        assert port_owner(port).startswith(f"pid {os.getpid()} ")
    assert port_owner(port) == ""


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("203.0.113.7", 0, "cannot listen on 203.0.113.7:0: Cannot assign requested address"),
        ("no such host", 0, "--http-host no such host --http-port 0: "),
        ("127.0.0.1", 99_999, "ports go from 0 to 65535"),
    ],
)
def test_a_host_or_port_that_cannot_be_had_is_a_config_error(
    host: str, port: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        listen(host, port)
    assert message in str(error.value)


def test_both_address_families_are_served() -> None:
    with listen("::1", 0) as six, listen("localhost", 0) as name:
        assert six.family == socket.AF_INET6
        assert name.getsockname()[1] > 0

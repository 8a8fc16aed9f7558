"""A running ingress over fake workers, and clients that watch its answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from tests.unit.ingress.checkpoints import MODEL
from tests.unit.ingress.fakes import FakeDiscovery, FakePlane, FakeWorker
from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.ingress.parts import Ingress
from trtllm_workers.ingress.ports import listen
from trtllm_workers.ingress.serve import HttpServer
from trtllm_workers.ingress.settings import IngressSettings
from trtllm_workers.observe.metrics import Metrics


class Call:
    """One POST over plain ASGI whose answer can be watched while it grows."""

    def __init__(self, app: Any, path: str, body: bytes) -> None:
        self._app = app
        self._scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self._body: list[bytes] = [body]
        self.left = asyncio.Event()
        self._grown = asyncio.Event()
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content = b""
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.content += message.get("body", b"")
        self._grown.set()

    async def until(self, text: str) -> None:
        """Wait until ``text`` has arrived."""
        async with asyncio.timeout(5):
            while text.encode() not in self.content:
                self._grown.clear()
                await self._grown.wait()

    async def result(self) -> httpx.Response:
        """Wait for the end of the response."""
        await asyncio.wait_for(self._task, 5)
        return httpx.Response(self.status, headers=self.headers, content=self.content)


class Stage:
    """A running ingress with fake workers, and a client that speaks ASGI to it."""

    def __init__(
        self,
        ingress: Ingress,
        plane: FakePlane,
        discovery: FakeDiscovery,
        app: Any,
        settings: IngressSettings,
    ) -> None:
        self.settings = settings
        self.server: HttpServer | None = None
        self.ingress = ingress
        self.plane = plane
        self.discovery = discovery
        self.app = app
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)

    @property
    def fleet(self) -> Fleet:
        assert self.ingress.fleet is not None
        return self.ingress.fleet

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a change of the fleet makes ``condition`` true."""
        async with asyncio.timeout(10):
            while not condition():
                self.fleet.changed.clear()
                await self.fleet.changed.wait()

    async def until_ready(self, *models: str) -> None:
        models = models or (MODEL,)
        known = self.fleet.models
        await self.until(lambda: all(name in known and known[name].ready for name in models))

    async def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return await self.client.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": messages, **fields}
        )

    def call(self, **fields: Any) -> Call:
        """Begin a streamed chat that can be watched."""
        messages = [{"role": "user", "content": "Hi"}]
        body = {"model": MODEL, "messages": messages, "stream": True, **fields}
        return Call(self.app, "/v1/chat/completions", json.dumps(body).encode())

    async def complete(self, prompt: Any = "Hi", **fields: Any) -> httpx.Response:
        return await self.client.post(
            "/v1/completions", json={"model": MODEL, "prompt": prompt, **fields}
        )


@asynccontextmanager
async def stage(*workers: FakeWorker, ready: bool = True, **settings: Any) -> AsyncIterator[Stage]:
    """Run an ingress over ``workers``."""
    told = IngressSettings(discovery="none:", secret=b"s", **settings)
    ingress = Ingress(told, Metrics(process=False))
    plane = FakePlane(ingress.on_message, ingress.on_lost)
    for worker in workers:
        plane.add(worker)
    discovery = FakeDiscovery()
    async with ingress.running(plane, discovery) as app:
        discovery.show(*(worker.record for worker in workers))
        playing = Stage(ingress, plane, discovery, app, told)
        async with playing.client:
            if ready:
                await playing.until_ready(*{worker.record.model for worker in workers})
            yield playing


def events(response: httpx.Response) -> list[Any]:
    """Return the JSON of every server-sent event, "[DONE]" as such."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines), response.text
    said = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in said]


@asynccontextmanager
async def http_stage(*workers: FakeWorker, **settings: Any) -> AsyncIterator[tuple[Stage, int]]:
    """Run an ingress over ``workers`` behind a real HTTP server; yields the stage and the port."""
    async with stage(*workers, **settings) as playing:
        listening = asyncio.Event()
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        server = HttpServer(playing.app, playing.settings, listening.set)
        playing.server = server
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            await asyncio.wait_for(listening.wait(), 5)
            yield playing, port
        finally:
            server.should_exit = True
            for connection in list(server.server_state.connections):
                connection.transport.abort()
            await asyncio.wait_for(serving, 10)
            sock.close()


def text_of(response: httpx.Response) -> str:
    said = events(response)
    assert said[-1] == "[DONE]"
    return "".join(
        event["choices"][0]["delta"].get("content", "") for event in said[:-1] if event["choices"]
    )

"""An OpenAI-like server without a socket: bytes a connection writes are answered at once. Holds no test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from tests.unit.bench.made import event, text_event
from trtllm_workers.bench.connection import Connection, Target

TEMPLATE_TOKENS = 5
Answer = Callable[[str, str, dict[str, Any]], bytes | None]


class FakeServer:
    """Serves one model that counts words; ``odd_words`` have two tokens, ``refused`` fields a 400.

    ``answer`` may answer instead: bytes, b"" closes the connection, None leaves it to the server.
    """

    def __init__(
        self,
        *,
        odd_words: tuple[str, ...] = (),
        refused: tuple[str, ...] = (),
        answer: Answer | None = None,
    ) -> None:
        self.odd_words = odd_words
        self.refused = refused
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.num_connections = 0
        self.in_flight = 0
        self.most_in_flight = 0

    async def connect(self, target: Target) -> Connection:
        self.num_connections += 1
        connection = Connection()
        connection.connection_made(cast(asyncio.Transport, _Transport(self, connection)))
        return connection

    def tokens(self, text: str) -> int:
        return sum(2 if word in self.odd_words else 1 for word in text.split())

    def respond(self, request: bytes) -> bytes:
        head, _, body = request.partition(b"\r\n\r\n")
        method, path = head.decode().split(" ")[:2]
        told = json.loads(body) if body else {}
        if self.answer is not None:
            answer = self.answer(method, path, told)
            if answer is not None:
                return answer
        if path == "/v1/models":
            return whole({"data": [{"id": "m", "max_model_len": 4096}]})
        if path != "/v1/chat/completions":
            return whole({"error": {"message": f"there is no {path}"}}, status=404)
        self.bodies.append(told)
        for name in self.refused:
            if name in told:
                return whole({"error": {"message": f"unknown field '{name}'"}}, status=400)
        tokens = TEMPLATE_TOKENS + self.tokens(told["messages"][0]["content"])
        usage = {"prompt_tokens": tokens, "completion_tokens": told["max_tokens"]}
        if not told.get("stream"):
            return whole({"choices": [], "usage": usage})
        return streamed(
            *(text_event(f"t{number}") for number in range(told["max_tokens"])),
            event(choices=[{"delta": {}, "finish_reason": "length"}]),
            event(choices=[], usage=usage),
            b"data: [DONE]\n\n",
        )


class _Transport:
    def __init__(self, server: FakeServer, connection: Connection) -> None:
        self._server = server
        self._connection = connection

    def write(self, request: bytes) -> None:
        server = self._server
        server.in_flight += 1
        server.most_in_flight = max(server.most_in_flight, server.in_flight)
        asyncio.get_running_loop().call_soon(self._answer, request)

    def _answer(self, request: bytes) -> None:
        self._server.in_flight -= 1
        response = self._server.respond(request)
        if response:
            self._connection.data_received(response)
        else:
            self._connection.connection_lost(None)

    def abort(self) -> None:
        self._connection.connection_lost(None)


def whole(value: object, status: int = 200) -> bytes:
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def streamed(*events: bytes) -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in events) + b"0\r\n\r\n"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeServer], FakeServer]:
    def patched(server: FakeServer) -> FakeServer:
        monkeypatch.setattr("trtllm_workers.bench.client.connect", server.connect)
        return server

    return patched

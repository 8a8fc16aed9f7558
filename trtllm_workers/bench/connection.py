"""One HTTP/1.1 connection that is kept: bytes to an answer, with the time they were read."""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import cast
from urllib.parse import urlsplit

import httptools

from trtllm_workers.bench.answer import Answer
from trtllm_workers.errors import ConfigError

_CONNECT_TIMEOUT_S = 10.0


class Target:
    """Where a server listens. Raises ConfigError for a URL that names none."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(
                f"--url: '{url}' is no address; write for example http://localhost:8000",
                param="url",
            )
        self.host = parts.hostname
        self.port = port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        # People copy the base URL of the API from the launcher's last line.
        self.prefix = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self._host_line = parts.netloc.rpartition("@")[2]

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Return the bytes of a request."""
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\nHost: {self._host_line}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"\r\n" + body


class Connection(asyncio.Protocol):
    """Carries one request at a time. ``alive`` is False once it cannot carry another."""

    def __init__(self) -> None:
        self.alive = False
        self.num_received = 0  # bytes since the request was sent
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._ended: asyncio.Future[str] | None = None
        self._content_type = b""
        self._now_s = 0.0

    async def ask(self, request: bytes, answer: Answer) -> str:
        """Send a request and take its answer; return what broke the connection, or ""."""
        assert self._transport is not None, "a connection asks after it was made"
        self._answer = answer
        self._ended = asyncio.get_running_loop().create_future()
        self.num_received = 0
        self._transport.write(request)
        return await self._ended

    def close(self) -> None:
        """End it now; an answer that is under way is lost."""
        self.alive = False
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's side ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are of no class of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.alive = True

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        self.num_received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as wrong:
            self._end(f"no HTTP: {wrong}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        why = f": {exc}" if exc is not None else ""
        self._end(f"the server closed the connection{why}")

    # --- the parser's side ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._content_type = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._content_type = value

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.begin(self._parser.get_status_code(), self._content_type)

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(body, self._now_s)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.alive = False
        if self._answer is not None:
            self._answer.end(self._now_s)
        self._end("")

    def _end(self, trouble: str) -> None:
        self._answer = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(trouble)


async def connect(target: Target) -> Connection:
    """Return a new connection. Raises OSError or TimeoutError."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_CONNECT_TIMEOUT_S):
        _, connection = await loop.create_connection(
            Connection, target.host, target.port, ssl=target.tls
        )
    return connection

"""One HTTP request and its response, over ASGI. Knows no model and no worker.

Where the server publishes its connection (``http.py``), waiting costs no task and the response
can be written straight to the transport; anywhere else plain ASGI does.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from trtllm_workers.errors import LaunchError, RequestError, TooLarge
from trtllm_workers.ingress.responses import error_body

EXTENSION = "trtllm_launch.connection"

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_JSON_TYPES = (b"application/json", b"text/json")

# How long, and how much of, a refused body is read and thrown away before the connection closes.
# Closing at once would reset the connection under a client that is still sending, and the client
# would never see why.
_DISCARD_S = 5.0
_DISCARD_BYTES = 256 << 20


class Connection(Protocol):
    """What the server publishes: ways to write past ASGI, and what to look at when doing so."""

    transport: asyncio.Transport
    flow: Any
    paused_since_s: float | None


class Exchange:
    """One request. ``status`` is the response's once it has started, else 0.

    ``more_headers`` go with the response, whatever it is.

    A client that takes nothing for ``stall_timeout_s`` is dropped, so that no write waits for ever.
    """

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, stall_timeout_s: float = 30.0
    ) -> None:
        self.scope = scope
        self._stall_timeout_s = stall_timeout_s
        self._receive = receive
        self._send = send
        self.gone = False
        self.status = 0
        self._body_read = False
        self._close_after = False
        self.more_headers: list[tuple[bytes, bytes]] = []
        published = (scope.get("extensions") or {}).get(EXTENSION)
        self.connection: Connection | None = published[0] if published else None
        self._cycle: Any = published[1] if published else None
        self._woken: asyncio.Event | None = None
        self._leaving: asyncio.Task[None] | None = None
        if self._cycle is not None:
            # uvicorn's own event: receive() waits for it, and sets nothing else in motion.
            self.wake: Callable[[], None] = self._cycle.message_event.set
        else:
            self._woken = asyncio.Event()
            self.wake = self._woken.set
        self.request_id = self._request_id()

    def header(self, name: bytes) -> bytes | None:
        """Return a request header by its lower-case name."""
        for key, value in self.scope["headers"]:
            if key == name:
                found: bytes = value
                return found
        return None

    def _request_id(self) -> str:
        given = self.header(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given.decode("ascii")
        return os.urandom(12).hex()

    async def body(self, max_bytes: int) -> bytes:
        """Return the request body. Raises TooLarge without holding more than ``max_bytes``.

        A body that is declared as something else than JSON is a RequestError.
        """
        content_type = self.header(b"content-type")
        declared = content_type.partition(b";")[0].strip().lower() if content_type else b""
        if declared and declared not in _JSON_TYPES and not declared.endswith(b"+json"):
            name = declared[:80].decode("latin-1")
            raise RequestError(
                f"the request body is declared as {name}; send the header "
                "'Content-Type: application/json'"
            )
        length = self.header(b"content-length")
        if length is not None and length.isdigit() and int(length) > max_bytes:
            raise _too_large(int(length), max_bytes)
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            return b""
        chunk: bytes = message.get("body", b"")
        if not message.get("more_body", False) and len(chunk) <= max_bytes:
            self._body_read = True
            return chunk
        chunks = [chunk]
        size = len(chunk)
        while size <= max_bytes:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                return b""
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size <= max_bytes and not message.get("more_body", False):
                self._body_read = True
                return b"".join(chunks)
        raise _too_large(size, max_bytes)

    async def woken(self) -> None:
        """Return when ``wake`` was called, or the client has left (``gone`` is then true)."""
        if self._woken is None:
            if (await self._receive())["type"] == "http.disconnect":
                self.gone = True
            return
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._until_left(), name="client-leaves")
        await self._woken.wait()
        self._woken.clear()

    async def _until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.wake()

    def drop(self) -> None:
        """Cut the connection under a client that does not read; ``gone`` from now on."""
        self.gone = True
        if self.connection is not None:
            self.connection.transport.abort()
        self.wake()

    async def close(self) -> None:
        """End what the exchange started."""
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the head of the response."""
        headers.append((b"x-request-id", self.request_id.encode("ascii")))
        headers += self.more_headers
        self.status = status
        await self._put({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """Send a piece of the response; waits while the client reads too slowly."""
        await self._put({"type": "http.response.body", "body": body, "more_body": more})

    async def _put(self, message: Event) -> None:
        connection = self.connection
        if connection is not None and not connection.flow.write_paused:
            await self._send(message)  # cannot wait, so it needs no deadline
            return
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._send(message)
        except TimeoutError:
            self.drop()

    async def respond(
        self, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        """Send a whole JSON response."""
        head = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *(headers or ()),
        ]
        unread = not self._body_read and self._expects_body()
        if unread:
            head.append((b"connection", b"close"))
        await self.start(status, head)
        if unread:
            await self.write(body)
            await self._discard_body()
            await self.write(b"", more=False)
        else:
            await self.write(body, more=False)

    async def refuse(self, error: LaunchError) -> None:
        """Send an error in OpenAI's shape."""
        headers = []
        if error.http_status in (429, 503):
            headers.append((b"retry-after", b"1"))
        await self.respond(error.http_status, error_body(error, self.request_id), headers)

    def _expects_body(self) -> bool:
        length = self.header(b"content-length")
        return length not in (None, b"0") or self.header(b"transfer-encoding") is not None

    async def _discard_body(self) -> None:
        deadline = time.monotonic() + _DISCARD_S
        discarded = 0
        try:
            while discarded < _DISCARD_BYTES:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await self._receive()
                discarded += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
        except TimeoutError:
            return


def _too_large(size: int, max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the request body has {size} bytes or more; at most {max_bytes} are accepted here"
    )

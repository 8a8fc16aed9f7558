"""uvicorn's HTTP protocol with its connection published to the app. Knows no route.

uvicorn keeps parsing, keep-alive, pipelining and shutdown. The app gets, under ``EXTENSION`` in the
scope, the pair (this protocol, the request's cycle): enough to write chunks without ``send``.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trtllm_workers.errors import RequestError, Unavailable
from trtllm_workers.ingress.exchange import EXTENSION
from trtllm_workers.ingress.responses import error_body

# A pause of reads and writes that the peer does not end is cut at the keep-alive timeout.
_REFUSAL = (
    b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%b"
)


def http_protocol(max_connections: int) -> type[HttpToolsProtocol]:
    """Return the protocol class for a server; ``max_connections`` 0 is no limit."""
    return type("IngressProtocol", (IngressProtocol,), {"max_connections": max_connections})


class IngressProtocol(HttpToolsProtocol):
    """One HTTP connection."""

    max_connections = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.paused_since_s: float | None = None
        self._cycles: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # Without it a token waits up to 40 ms for the acknowledgement of the one before.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.max_connections and len(self.connections) > self.max_connections:
            error = Unavailable(f"{self.max_connections} connections are open already")
            body = error_body(error)
            transport.write(_REFUSAL % (b"503 Service Unavailable", len(body), body))
            transport.close()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        cycle = self.cycle
        cycle.scope["extensions"] = {EXTENSION: (self, cycle)}  # type: ignore[dict-item]
        self._cycles = [one for one in self._cycles if not one.response_complete]
        self._cycles.append(cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn tells only the newest of several pipelined requests that the client has left.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._cycles.clear()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.paused_since_s = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.paused_since_s = None

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            # A response nobody reads: close() would wait for its bytes to leave, for ever.
            self.transport.abort()
            return
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        body = error_body(RequestError(msg))
        self.transport.write(_REFUSAL % (b"400 Bad Request", len(body), body))
        self.transport.close()

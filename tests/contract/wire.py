"""A connection to or from the TCP mesh whose bytes the test writes itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

from tests.contract.planes import SECRET, Endpoint, soon
from trtllm_workers.planes.frames import Decoder
from trtllm_workers.planes.handshake import Handshake
from trtllm_workers.planes.messages import Message
from trtllm_workers.types import Address

STRANGER = Address("127.0.0.1", 1, "stranger", "1")


class Wire:
    """A connection whose bytes the test writes itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer
        self._decoder = Decoder()

    def send(self, raw: bytes) -> None:
        self._writer.write(raw)

    async def message(self) -> Message:
        """Return the next message the mesh sends; more than one at once fails the test."""
        while not (messages := self._decoder.feed(await soon(self.reader.read(65536)))):
            assert not self.reader.at_eof()
        (message,) = messages
        return message

    async def ended(self) -> bytes:
        """Wait until the mesh hangs up; return what it said before."""
        with contextlib.suppress(ConnectionResetError):
            return await soon(self.reader.read())
        return b""

    async def hang_up(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


@contextlib.asynccontextmanager
async def dialed(endpoint: Endpoint, me: Address | None = STRANGER) -> AsyncIterator[Wire]:
    """Connect to a mesh as ``me``, who holds the secret; as nobody (no handshake) with None."""
    address = endpoint.address
    wire = Wire(*await soon(asyncio.open_connection(address.host, address.port)))
    try:
        if me is not None:
            handshake = Handshake(me, SECRET, address, {})
            wire.send(handshake.opening())
            while handshake.peer is None:
                wire.send(handshake.feed(await soon(wire.reader.read(65536))))
            assert handshake.rest == b""
        yield wire
    finally:
        await wire.hang_up()


@contextlib.asynccontextmanager
async def listening(serve: Callable[[Wire], Awaitable[None]]) -> AsyncIterator[Address]:
    """Be a listener that answers with ``serve``, and not as a mesh would."""

    accepted: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.add(cast("asyncio.Task[None]", asyncio.current_task()))
        wire = Wire(reader, writer)
        await serve(wire)
        await wire.hang_up()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1], "silent", "1")
    finally:
        server.close()
        await soon(asyncio.gather(*accepted))


async def stay_silent(wire: Wire) -> None:
    await wire.ended()

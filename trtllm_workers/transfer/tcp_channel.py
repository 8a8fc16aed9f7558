"""One authenticated connection between two transports, and the listener that takes them.

Runs on the event loop of a transport's thread. A channel has one question under way at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from trtllm_workers.errors import TransferFailed, TransportUnavailable
from trtllm_workers.transfer import tcp_socket
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.tcp_frames import (
    HEAD,
    MAX_FRAME_BYTES,
    MAX_GREETING_BYTES,
    NONCE_BYTES,
    TOKEN_BYTES,
    VERSION,
    Challenge,
    Frame,
    Hello,
    Proof,
    Refusal,
    Welcome,
    pack,
    printable,
    proof,
    refusal,
    same,
    unpack,
    welcome_proof,
)
from trtllm_workers.transfer.tcp_thread import LoopThread
from trtllm_workers.types import KvLayout, TransportCard

_GREETING_DEADLINE_S: Final = 10.0
_MAX_STRANGERS: Final = 64  # connections that have not proved themselves yet
_BACKLOG: Final = 128

F = TypeVar("F", bound=Frame)


class Door(msgspec.Struct, frozen=True, array_like=True):
    """Where a transport listens, and what opens it. Part of a card, and secret."""

    host: str
    port: int
    token: bytes


D = TypeVar("D", bound=Door)


def read_door(card: TransportCard, kind: type[D]) -> D:
    """Return the door that a card tells. Raises TransferFailed when its address is damaged."""
    damaged = f"connect to {card.peer_id}: the address of its card is damaged"
    try:
        door = msgspec.msgpack.decode(card.address, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferFailed(f"{damaged}: {error}") from error
    if not 0 < door.port < 65536 or len(door.token) != TOKEN_BYTES:
        raise TransferFailed(f"{damaged}: port {door.port}, token of {len(door.token)} bytes")
    return door


class Channel:
    """Frames and bytes on one socket. Whoever made it closes it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.peer_id = ""

    async def say(self, frame: Frame, *then: memoryview) -> None:
        """Send a frame and bytes behind it."""
        await tcp_socket.send(self.sock, [memoryview(pack(frame)), *then])

    async def hear(self, limit: int = MAX_FRAME_BYTES) -> Frame:
        """Return the next frame. Raises TransferFailed when it is none, ConnectionError at the end."""
        head = bytearray(HEAD.size)
        await tcp_socket.receive(self.sock, [memoryview(head)])
        (size,) = HEAD.unpack(head)
        if not 0 < size <= limit:
            raise TransferFailed(
                f"the other side sent a frame of {size} bytes; is it a trtllm-launch worker?"
            )
        body = bytearray(size)
        await tcp_socket.receive(self.sock, [memoryview(body)])
        return unpack(body)

    async def expect(self, kind: type[F], limit: int = MAX_FRAME_BYTES) -> F:
        """Return the next frame, which must be of ``kind``. Raises TransferFailed with its refusal."""
        frame = await self.hear(limit)
        if isinstance(frame, Refusal):
            raise TransferFailed(f"refused: {printable(frame.message)}")
        if not isinstance(frame, kind):
            raise TransferFailed(
                f"the other side sent a {type(frame).__name__} instead of a {kind.__name__}"
            )
        return frame

    def close(self) -> None:
        """End the connection at once. Safe twice."""
        tcp_socket.abort(self.sock)


@dataclass(frozen=True, slots=True)
class Owner:
    """What the listening side of a transport tells and checks."""

    transport: str
    peer_id: str
    token: bytes
    pool: KvPool


async def dial(
    door: Door, transport: str, our_id: str, peer_id: str
) -> tuple[Channel, KvLayout, int]:
    """Return an authenticated channel to ``peer_id`` and its pool's layout and number of blocks.

    Raises TransferFailed or OSError. The caller sets the deadline.
    """
    channel = await _connected(door)
    try:
        hello = Hello(VERSION, transport, our_id, os.urandom(NONCE_BYTES))
        await channel.say(hello)
        challenge = await channel.expect(Challenge, MAX_GREETING_BYTES)
        if challenge.peer_id != peer_id:
            raise TransferFailed(
                f"{printable(challenge.peer_id)} listens there now; it was restarted or its port reused"
            )
        await channel.say(Proof(proof(door.token, hello, challenge)))
        welcome = await channel.expect(Welcome, MAX_GREETING_BYTES)
        expected = welcome_proof(door.token, hello, challenge, welcome.layout, welcome.num_blocks)
        if not same(welcome.mac, expected):
            raise TransferFailed("it does not hold the token of its own card")
    except BaseException:
        channel.close()
        raise
    channel.peer_id = peer_id
    return channel, welcome.layout, welcome.num_blocks


async def _connected(door: Door) -> Channel:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(door.host, door.port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        channel = Channel(sock)
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return channel


class Listener:
    """Takes connections, lets in who holds the token, and runs ``serve`` for each; ends with the thread.

    ``serve`` may raise TransferFailed or OSError: that connection then ends, and no other.
    """

    def __init__(
        self, thread: LoopThread, owner: Owner, serve: Callable[[Channel], Awaitable[None]]
    ) -> None:
        self._thread = thread
        self._owner = owner
        self._serve = serve
        self._strangers = 0
        self.door = Door("", 0, b"")

    async def open(self, host: str) -> None:
        """Listen on a free port of ``host``. Raises TransportUnavailable."""
        loop = asyncio.get_running_loop()
        name = self._owner.transport
        try:
            found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = found[0]
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                sock.bind(address)
                sock.listen(_BACKLOG)
            except OSError:
                sock.close()
                raise
        except OSError as error:
            raise TransportUnavailable(
                f"transport {name} cannot listen on {host}: {error.strerror or error}; give a host "
                "name or address of this machine"
            ) from error
        bound = sock.getsockname()
        reachable = socket.gethostname() if host in ("0.0.0.0", "::", "") else str(bound[0])
        self.door = Door(reachable, int(bound[1]), self._owner.token)
        self._thread.spawn(self._accept(sock))

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    taken, _ = await loop.sock_accept(sock)
                except OSError:
                    # Out of descriptors, or the peer was gone already: not to be asked again at once.
                    await asyncio.sleep(0.1)
                    continue
                if self._strangers >= _MAX_STRANGERS:
                    taken.close()
                    continue
                self._thread.spawn(self._attend(taken))
        finally:
            sock.close()

    async def _attend(self, sock: socket.socket) -> None:
        try:
            with contextlib.suppress(TransferFailed, OSError, TimeoutError):
                channel = Channel(sock)
                self._strangers += 1
                try:
                    async with asyncio.timeout(_GREETING_DEADLINE_S):
                        await self._greet(channel)
                finally:
                    self._strangers -= 1
                await self._serve(channel)
        finally:
            tcp_socket.abort(sock)

    async def _greet(self, channel: Channel) -> None:
        owner = self._owner
        hello = await channel.expect(Hello, MAX_GREETING_BYTES)
        if hello.version != VERSION or hello.transport != owner.transport:
            await self._refuse(
                channel,
                f"{owner.peer_id} speaks {owner.transport} version {VERSION}, not "
                f"{printable(hello.transport)} version {hello.version}",
            )
        challenge = Challenge(owner.peer_id, os.urandom(NONCE_BYTES))
        await channel.say(challenge)
        given = await channel.expect(Proof, MAX_GREETING_BYTES)
        if not same(given.mac, proof(owner.token, hello, challenge)):
            await self._refuse(
                channel, "the token of the card is not ours; ask for a new card, it may be stale"
            )
        layout, num_blocks = owner.pool.layout, owner.pool.num_blocks
        mac = welcome_proof(owner.token, hello, challenge, layout, num_blocks)
        await channel.say(Welcome(mac, layout, num_blocks))
        channel.peer_id = hello.peer_id

    async def _refuse(self, channel: Channel, reason: str) -> None:
        await channel.say(refusal(reason))
        # An orderly end, so that the words arrive; the abort that follows would drop them.
        channel.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            await channel.hear(MAX_GREETING_BYTES)
        raise TransferFailed(reason)

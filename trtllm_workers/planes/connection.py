"""One TCP connection of the mesh, from handshake to loss. Knows no other connection.

::

    made ──handshake──▶ open ──▶ ended        open: messages flow, pings are answered
      └───refused, silent for too long──▲     ended: told to the owner exactly once
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Final, Protocol, cast

import structlog

from trtllm_workers.errors import AuthenticationFailed, FrameError, PeerLost, PlaneError
from trtllm_workers.planes.base import OnMessage
from trtllm_workers.planes.frames import Decoder, encode
from trtllm_workers.planes.handshake import Handshake, refusal
from trtllm_workers.planes.messages import Message, Ping, Pong
from trtllm_workers.planes.tls import NotEncrypted, PlaneTls, TlsPipe
from trtllm_workers.types import Address

HANDSHAKE_TIMEOUT_S: Final = 5.0
_HIGH_WATER_BYTES: Final = 1024 * 1024  # write_paused above this, and not below a quarter of it

log = structlog.get_logger(__name__)


class Owner(Protocol):
    """What a connection needs of its mesh. ``made`` and ``ended`` come once each, in this order."""

    secret: bytes
    tls: PlaneTls | None
    on_message: OnMessage
    max_buffered_bytes: int

    @property
    def address(self) -> Address: ...
    @property
    def youngest(self) -> Mapping[str, str]: ...
    def made(self, connection: Connection) -> None: ...
    def opened(self, connection: Connection) -> None: ...
    def ended(self, connection: Connection, error: PlaneError, *, was_open: bool) -> None: ...


class Connection(asyncio.Protocol):
    """Implements Peer. ``dialed`` is the address the owner connects to; None when accepted."""

    def __init__(self, owner: Owner, dialed: Address | None = None) -> None:
        self.dialed = dialed
        self.last_heard_s = 0.0
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.open: asyncio.Future[None] = self._loop.create_future()
        # Whoever dials may have given up; an error nobody waits for must not be reported as lost.
        self.open.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._transport: asyncio.Transport | None = None
        self._tls: TlsPipe | None = None
        self._handshake: Handshake | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._address = dialed
        self._from = str(dialed)
        self._is_open = False
        self._error: PlaneError | None = None
        self._decoder = Decoder()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._paused = False
        self._ping_number = 0

    def __repr__(self) -> str:
        state = "open" if self.alive else "ended" if self._error else "handshake"
        return f"<Connection {self._address or self._from} {state}>"

    # Peer

    @property
    def address(self) -> Address:
        if self._address is None:
            raise RuntimeError("an accepted connection has an address once its handshake is done")
        return self._address

    @property
    def write_paused(self) -> bool:
        return self._paused

    def send(self, message: Message) -> None:
        """Queue a message for this loop iteration's write.

        Raises PeerLost when the connection has ended, or ends here because more than the owner's
        ``max_buffered_bytes`` wait for a peer that does not read; FrameError for a message over the
        limit of one frame, which does not touch the connection.
        """
        if self._error is not None or not self._is_open:
            raise PeerLost(str(self._error or f"{self!r} is not open yet"))
        frame = encode(message)
        out = self._out
        if not out:
            self._loop.call_soon(self._flush)
        out.append(frame)
        self._out_bytes += len(frame)
        if self._paused or self._out_bytes > _HIGH_WATER_BYTES:
            self._check_buffer()

    # The owner's side

    @property
    def source(self) -> str:
        """Return where an accepted connection came from."""
        return self._from

    @property
    def alive(self) -> bool:
        """Whether the handshake is done and the connection has not ended."""
        return self._is_open and self._error is None

    def ping(self) -> None:
        """Ask the peer to show that it is there."""
        self._ping_number += 1
        self._send_quietly(Ping(self._ping_number))

    def lose(self, error: PlaneError) -> None:
        """End the connection at once; what was not written yet is dropped."""
        if self._error is None:
            self._error = error
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()

    def close(self, error: PlaneError) -> None:
        """End the connection after what was sent has been written."""
        self._flush()
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.close()

    def refuse(self, error: PlaneError) -> None:
        """End a handshake and tell the other side why."""
        if self._error is None and self._transport is not None:
            self._error = error
            if self._handshake is not None and not self._handshake.refused:
                self._write(refusal(error))
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES, _HIGH_WATER_BYTES // 4)
        # asyncio and uvloop set it too; here it does not depend on them.
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.dialed is None:
            self._from = str(transport.get_extra_info("peername"))
        owner = self._owner
        if owner.tls is not None:
            self._tls = owner.tls.pipe(owner.address, self.dialed)
        self._handshake = Handshake(owner.address, owner.secret, self.dialed, owner.youngest)
        self._deadline = self._loop.call_later(
            HANDSHAKE_TIMEOUT_S,
            self.refuse,
            PeerLost(f"no handshake with {self._from} within {HANDSHAKE_TIMEOUT_S:g} s"),
        )
        owner.made(self)
        if self._error is None and (opening := self._handshake.opening()):
            self._write(opening)

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        self.last_heard_s = self._loop.time()
        if self._tls is not None:
            data = self._decrypted(self._tls, data)
            if not data:
                return
        if self._handshake is not None:
            data = self._shake_hands(self._handshake, data)
        try:
            messages = self._decoder.feed(data)
        except FrameError as error:
            self.lose(PeerLost(f"{self._address} sent bytes that are no frame: {error}"))
            return
        on_message = self._owner.on_message
        for message in messages:
            kind = type(message)
            if kind is Ping:
                self._send_quietly(Pong(cast("Ping", message).number))
            elif kind is not Pong:
                try:
                    on_message(self, message)
                except Exception as error:
                    # The border: a handler's bug or a bad message costs this connection only.
                    log.exception("message handler failed", peer=str(self._address))
                    words = f"a {kind.__name__} of {self._address} could not be handled: {error!r}"
                    self.lose(PeerLost(words))
            if self._error is not None:
                return

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        error = self._error
        if error is None:
            # A reset or an end was sent by the other side; a time-out is this side's guess.
            there = exc is None or isinstance(exc, (ConnectionResetError, BrokenPipeError))
            error = self._error = PeerLost(self._why_lost(exc), ended_there=there)
        self._out.clear()
        self._paused = False
        if not self.open.done():
            self.open.set_exception(error)
        self._owner.ended(self, error, was_open=self._is_open)

    # Inside

    def _decrypted(self, tls: TlsPipe, data: bytes) -> bytes:
        """Return what an encrypted peer sent; nothing when that ended the connection."""
        try:
            plain = tls.receive(data)
        except AuthenticationFailed as error:
            if isinstance(error, NotEncrypted):
                self._tls = None
            if self._is_open:
                self.lose(PeerLost(str(error)))
            else:
                self.refuse(error)
            return b""
        if answer := tls.outgoing():
            self._put_on_wire(answer)
        return plain

    def _shake_hands(self, handshake: Handshake, data: bytes) -> bytes:
        """Go on with the handshake; return what came behind it, once it is done."""
        try:
            answer = handshake.feed(data)
        except PlaneError as error:
            self.refuse(error)
            return b""
        if answer:
            self._write(answer)
        if handshake.peer is None or self._error is not None:
            return b""
        self._address, self._handshake, self._is_open = handshake.peer, None, True
        if self._deadline is not None:
            self._deadline.cancel()
        self._owner.opened(self)
        if not self.open.done():
            self.open.set_result(None)
        return handshake.rest

    def _why_lost(self, exc: Exception | None) -> str:
        who = str(self._address or self._from)
        if exc is not None:
            return f"the connection to {who} broke: {exc}"
        if self._tls is not None and not self._is_open:
            return f"{who} ended the TLS handshake; its log says why, if it is a process of ours"
        try:
            self._decoder.end()
        except FrameError as error:
            return f"{who} went away: {error}"
        return f"{who} closed the connection"

    def _flush(self) -> None:
        if self._out:
            joined = b"".join(self._out)
            self._out.clear()
            self._out_bytes = 0
            self._write(joined)

    def _write(self, written: bytes) -> None:
        if self._tls is not None:
            self._tls.send(written)
            written = self._tls.outgoing()
        if written:
            self._put_on_wire(written)

    def _put_on_wire(self, written: bytes) -> None:
        try:
            cast("asyncio.Transport", self._transport).write(written)
        except (RuntimeError, OSError) as error:
            # uvloop raises on a closed handle before it has told connection_lost.
            self.lose(PeerLost(f"the connection to {self._address or self._from} broke: {error}"))

    def _check_buffer(self) -> None:
        waiting = (
            self._out_bytes + cast("asyncio.Transport", self._transport).get_write_buffer_size()
        )
        if waiting > self._owner.max_buffered_bytes:
            lost = PeerLost(
                f"{self._address} does not read: {waiting} bytes wait for it, more than the limit of "
                f"{self._owner.max_buffered_bytes}"
            )
            self.lose(lost)
            raise PeerLost(str(lost))

    def _send_quietly(self, message: Message) -> None:
        try:
            self.send(message)
        except PeerLost:
            return  # the loss is on its way to the owner

"""One connection on a transport that only notes: what is written, when, and after which failure."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from trtllm_workers.errors import PeerLost, PlaneError
from trtllm_workers.planes.base import OnMessage, Peer
from trtllm_workers.planes.connection import Connection
from trtllm_workers.planes.frames import Decoder, encode
from trtllm_workers.planes.handshake import Handshake
from trtllm_workers.planes.messages import Drain, Message, Ping, Pong
from trtllm_workers.planes.tls import PlaneTls
from trtllm_workers.types import Address

ME = Address("127.0.0.1", 1, "me", "1")
PEER = Address("127.0.0.1", 2, "peer", "1")


class NotedTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__({"socket": socket.socket(), "peername": ("127.0.0.1", 2)})
        self.writes: list[bytes] = []
        self.fails_with: Exception | None = None
        self.aborted = self.closed = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, written: Any) -> None:
        if self.fails_with is not None:
            raise self.fails_with
        self.writes.append(bytes(written))

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.closed = True


class NotedOwner:
    """Implements Owner."""

    secret = b"secret"
    tls: PlaneTls | None = None
    max_buffered_bytes = 1_000_000
    address = ME

    def __init__(self) -> None:
        self.youngest: dict[str, str] = {}
        self.events: list[str] = []
        self.errors: list[PlaneError] = []
        self.received: list[Message] = []
        self.on_message: OnMessage = self._note

    def _note(self, _peer: Peer, message: Message) -> None:
        self.received.append(message)

    def made(self, _connection: Connection) -> None:
        self.events.append("made")

    def opened(self, _connection: Connection) -> None:
        self.events.append("opened")

    def ended(self, _connection: Connection, error: PlaneError, *, was_open: bool) -> None:
        self.events.append("ended open" if was_open else "ended")
        self.errors.append(error)


def opened() -> tuple[Connection, NotedTransport, NotedOwner]:
    """Return a connection whose handshake is done; the writes of it are forgotten."""
    owner, transport = NotedOwner(), NotedTransport()
    subject = Connection(owner)
    subject.connection_made(transport)
    transport.get_extra_info("socket").close()
    other = Handshake(PEER, owner.secret, ME, {})
    subject.data_received(other.opening())
    subject.data_received(other.feed(transport.writes[-1]))
    other.feed(transport.writes[-1])
    assert other.peer == ME
    assert owner.events == ["made", "opened"]
    transport.writes.clear()
    return subject, transport, owner


async def test_everything_sent_in_one_loop_iteration_leaves_in_one_write() -> None:
    subject, transport, _ = opened()
    sent: list[Message] = [Drain(str(number)) for number in range(32)]
    for message in sent:
        subject.send(message)
    assert transport.writes == []
    await asyncio.sleep(0)
    assert len(transport.writes) == 1
    assert Decoder().feed(transport.writes[0]) == sent
    subject.send(Drain("next"))
    await asyncio.sleep(0)
    assert len(transport.writes) == 2


async def test_answers_to_one_arrival_leave_in_one_write() -> None:
    subject, transport, owner = opened()
    owner.on_message = lambda peer, message: peer.send(message)
    subject.data_received(encode(Ping(1)) + encode(Drain("a")) + encode(Drain("b")))
    await asyncio.sleep(0)
    (written,) = transport.writes
    assert Decoder().feed(written) == [Pong(1), Drain("a"), Drain("b")]


async def test_write_on_a_handle_that_is_closed_already_loses_the_connection() -> None:
    subject, transport, owner = opened()
    transport.fails_with = RuntimeError("unable to perform operation; the handler is closed")
    subject.send(Drain("x"))
    await asyncio.sleep(0)
    assert transport.aborted
    with pytest.raises(PeerLost, match="handler is closed"):
        subject.send(Drain("y"))
    subject.connection_lost(None)
    assert owner.events == ["made", "opened", "ended open"]


async def test_nothing_is_delivered_after_the_connection_was_ended_here() -> None:
    subject, _, owner = opened()
    owner.on_message = lambda _peer, _message: subject.lose(PeerLost("enough"))
    subject.data_received(encode(Drain("a")) + encode(Drain("b")))
    owner.on_message = owner._note
    subject.data_received(encode(Drain("c")))
    assert owner.received == []


async def test_what_was_sent_before_close_is_written() -> None:
    subject, transport, _ = opened()
    subject.send(Drain("last words"))
    subject.close(PeerLost("we leave"))
    assert Decoder().feed(b"".join(transport.writes)) == [Drain("last words")]
    assert transport.closed
    await asyncio.sleep(0)
    assert len(transport.writes) == 1


async def test_send_before_the_handshake_is_done_is_refused() -> None:
    owner, transport = NotedOwner(), NotedTransport()
    subject = Connection(owner)
    subject.connection_made(transport)
    transport.get_extra_info("socket").close()
    with pytest.raises(PeerLost, match="not open yet"):
        subject.send(Drain("x"))
    subject.connection_lost(None)
    assert owner.events == ["made", "ended"]
    assert transport.writes == []


async def test_break_of_the_connection_is_told_with_its_cause() -> None:
    subject, _, owner = opened()
    subject.connection_lost(ConnectionResetError("reset by peer"))
    assert "peer@127.0.0.1:2 broke: reset by peer" in str(owner.errors[0])

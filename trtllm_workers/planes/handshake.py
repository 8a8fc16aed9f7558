"""Two processes prove to each other that they hold the cluster secret. Pure: bytes in, bytes out.

::

    connector                                    acceptor
        │ ── Hello: who I am, nonce, who I expect ──▶ │
        │ ◀── Hello: who I am, nonce ──────────────── │
        │ ── Proof: HMAC over both hellos ──────────▶ │  checks secret, then whom it expects
        │ ◀── Proof: HMAC over both hellos ────────── │  or Refusal: why not
        ▼ checks it; the connection is open           ▼

The HMAC-SHA256 covers a label, the protocol version, the direction and every byte of both hellos:
ids, incarnations, addresses and two fresh nonces. So a proof fits one handshake and one direction:
neither a recording nor a reflection is of use. The connector proves first, so that a stranger who
connects gets nothing made with the secret.

It does not encrypt (``tls.py`` does, below it, where files for that are given): otherwise whoever
sits on the path can read what follows, or change it.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from trtllm_workers.errors import (
    AuthenticationFailed,
    FrameError,
    PeerLost,
    PlaneError,
    StaleIncarnation,
)
from trtllm_workers.planes.frames import PROTOCOL_VERSION, pack, take_body
from trtllm_workers.planes.tls import REMEDY, looks_like_tls
from trtllm_workers.types import Address

MAX_HANDSHAKE_BYTES: Final = 4096  # of one frame; a stranger cannot make us keep more
NONCE_BYTES: Final = 32
_LABEL = b"trtllm-launch request plane"
_MAX_REASON = 500


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """Who speaks, and (from the connector) whom it means to reach as (peer_id, incarnation)."""

    connector: bool
    me: Address
    nonce: bytes
    expects: tuple[str, str] | None = None


class Proof(msgspec.Struct, frozen=True, tag="proof", array_like=True):
    """HMAC-SHA256 of the handshake so far."""

    mac: bytes


class Refusal(msgspec.Struct, frozen=True, tag="refusal", array_like=True):
    """Why the sender hangs up: an error's code and its words."""

    code: str
    message: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Hello | Proof | Refusal).decode
_REFUSALS: dict[str, type[PlaneError]] = {
    str(error.code): error for error in (AuthenticationFailed, StaleIncarnation)
}


def refusal(error: PlaneError) -> bytes:
    """Return the frame that tells the other side why we hang up."""
    return pack(_encode(Refusal(str(error.code), str(error)[:_MAX_REASON])))


@dataclass
class Handshake:
    """One side of one handshake.

    ``dialed`` is where the connector meant to go; None makes this the acceptor. ``youngest`` maps
    peer ids to the youngest incarnation met so far. After ``feed`` has set ``peer`` the other side
    is known and trusted, and ``rest`` holds bytes that came behind the handshake.
    """

    me: Address
    secret: bytes
    dialed: Address | None
    youngest: Mapping[str, str]
    nonce: bytes = field(default_factory=lambda: os.urandom(NONCE_BYTES))

    def __post_init__(self) -> None:
        self.peer: Address | None = None
        self.refused = False
        self.rest = b""
        self._theirs: Hello | None = None
        self._buffer = bytearray()
        expects = None if self.dialed is None else (self.dialed.peer_id, self.dialed.incarnation)
        self._hello = _encode(Hello(self.dialed is not None, self.me, self.nonce, expects))
        self._hellos: list[bytes] = []

    def opening(self) -> bytes:
        """Return what this side sends before it hears anything."""
        return b"" if self.dialed is None else pack(self._hello)

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the other side and return the answer to send, which may be empty.

        Raises AuthenticationFailed, StaleIncarnation, FrameError (bytes that are no handshake of
        this protocol version) or PeerLost (refused for another reason). ``refusal`` makes the
        frame that tells the other side; when ``refused`` is true it is the one that hung up.
        """
        self._buffer += data
        if self._theirs is None and looks_like_tls(self._buffer):
            raise AuthenticationFailed(
                f"the other side encrypts its request plane, but {self.me} does not; {REMEDY}"
            )
        answer = b""
        while self.peer is None:
            body = take_body(self._buffer, MAX_HANDSHAKE_BYTES)
            if body is None:
                return answer
            answer += self._step(body)
        self.rest = bytes(self._buffer)
        self._buffer.clear()
        return answer

    def _step(self, body: bytes) -> bytes:
        try:
            message = _decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"the other side sent no handshake: {error}") from error
        if isinstance(message, Refusal):
            self.refused = True
            raise _refused_by(self.dialed, message)
        if isinstance(message, Hello) and self._theirs is None:
            return self._greet(message, body)
        if isinstance(message, Proof) and self._theirs is not None:
            return self._verify(self._theirs, message)
        raise FrameError(f"the other side sent a {type(message).__name__} out of turn")

    def _greet(self, hello: Hello, body: bytes) -> bytes:
        if hello.connector == (self.dialed is not None) or hello.nonce == self.nonce:
            raise AuthenticationFailed("the other side sent our own greeting back to us")
        if len(hello.nonce) != NONCE_BYTES:
            raise FrameError(f"a nonce has {len(hello.nonce)} bytes, not {NONCE_BYTES}")
        self._theirs = hello
        if self.dialed is None:
            self._hellos = [body, self._hello]
            return pack(self._hello)
        self._hellos = [self._hello, body]
        return pack(_encode(Proof(self._mac(by_connector=True))))

    def _verify(self, hello: Hello, proof: Proof) -> bytes:
        by_connector = self.dialed is None
        if not hmac.compare_digest(proof.mac, self._mac(by_connector=by_connector)):
            raise AuthenticationFailed(
                f"{_printable(str(hello.me))} and {self.me} do not hold the same cluster secret; start "
                "both with one secret (or one discovery folder)"
            )
        wanted = hello.expects if self.dialed is None else None
        if wanted is not None and wanted != (self.me.peer_id, self.me.incarnation):
            raise _stale(wanted, self.me)
        if self.dialed is not None:
            wanted = (self.dialed.peer_id, self.dialed.incarnation)
            if wanted != (hello.me.peer_id, hello.me.incarnation):
                raise _stale(wanted, hello.me)
        youngest = self.youngest.get(hello.me.peer_id, "")
        if hello.me.incarnation < youngest:
            raise StaleIncarnation(
                f"{hello.me} is incarnation {hello.me.incarnation}, but incarnation {youngest} of "
                "it was met already; the older process must end"
            )
        self.peer = hello.me
        return pack(_encode(Proof(self._mac(by_connector=False)))) if self.dialed is None else b""

    def _mac(self, *, by_connector: bool) -> bytes:
        transcript = _encode([_LABEL, PROTOCOL_VERSION, by_connector, *self._hellos])
        return hmac.digest(self.secret, transcript, "sha256")


def _stale(wanted: tuple[str, str], found: Address) -> StaleIncarnation:
    peer_id, incarnation = wanted
    return StaleIncarnation(
        f"wanted {peer_id} of incarnation {incarnation}, but {found} of incarnation "
        f"{found.incarnation} answers; it was restarted or its port was reused: ask discovery again"
    )


def _refused_by(dialed: Address | None, message: Refusal) -> PlaneError:
    """Return the other side's refusal as our error."""
    who = "the connecting side" if dialed is None else str(dialed)
    error = _REFUSALS.get(message.code, PeerLost)
    return error(f"{who} refused the connection: {_printable(message.message)}")


def _printable(words: str) -> str:
    """Return a stranger's words, safe to log."""
    return "".join(c if c.isprintable() else "?" for c in words[:_MAX_REASON])

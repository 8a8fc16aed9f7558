"""What two ends of a pool connection say to each other. Pure: bytes in, bytes out.

::

    dialer                                           owner of the pool
        │ ── Hello: version, transport, who, nonce ──────▶ │
        │ ◀── Challenge: who, nonce ────────────────────── │  or Refusal: why not
        │ ── Proof: HMAC over both ──────────────────────▶ │  checks the token of the card
        │ ◀── Welcome: HMAC over both and the pool ─────── │  or Refusal
        ▼ checks it, then the layout                       ▼

The HMAC-SHA256 is keyed with the token of the owner's card and covers a label, the direction and
both nonces. So only who holds the card gets in, and only its maker can answer. Nothing that
follows is encrypted.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from trtllm_workers.errors import TransferFailed
from trtllm_workers.types import KvLayout

VERSION: Final = 1
TOKEN_BYTES: Final = 32
NONCE_BYTES: Final = 32
MAX_GREETING_BYTES: Final = 16 * 1024  # of one frame; a stranger cannot make us keep more
MAX_FRAME_BYTES: Final = 16 * 1024 * 1024  # 4 M block ids, or a long notification
HEAD: Final = struct.Struct("<I")
_LABEL = b"trtllm-launch kv pool"
_MAX_REASON = 500


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """Who dials, and which transport it means to reach."""

    version: int
    transport: str
    peer_id: str
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, tag="challenge", array_like=True):
    """Who answers."""

    peer_id: str
    nonce: bytes


class Proof(msgspec.Struct, frozen=True, tag="proof", array_like=True):
    """The dialer holds the token."""

    mac: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome", array_like=True):
    """The owner holds the token, and this is its pool."""

    mac: bytes
    layout: KvLayout
    num_blocks: int


class Refusal(msgspec.Struct, frozen=True, tag="refusal", array_like=True):
    """Why the owner does not do it. Nothing has moved."""

    message: str


class Read(msgspec.Struct, frozen=True, tag="read", array_like=True):
    """Send these blocks: Ready and their bytes come back, or Refusal."""

    block_ids: bytes
    timeout_s: float


class Write(msgspec.Struct, frozen=True, tag="write", array_like=True):
    """Take these blocks: Ready or Refusal comes back, then the bytes go, then Done comes back."""

    block_ids: bytes
    timeout_s: float


class Notify(msgspec.Struct, frozen=True, tag="notify", array_like=True):
    """Give this to on_notify: Done comes back."""

    message: bytes


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The ids are right; bytes follow."""


class Done(msgspec.Struct, frozen=True, tag="done", array_like=True):
    """It has happened."""


Frame = Hello | Challenge | Proof | Welcome | Refusal | Read | Write | Notify | Ready | Done

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def pack(frame: Frame) -> bytes:
    """Return a frame with its length in front. Raises TransferFailed when it is too long."""
    body = _encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise TransferFailed(
            f"a {type(frame).__name__.lower()} of {len(body)} bytes exceeds {MAX_FRAME_BYTES}; "
            "send it in parts"
        )
    return HEAD.pack(len(body)) + body


def unpack(body: bytes | bytearray) -> Frame:
    """Return the frame in ``body``. Raises TransferFailed when it is none of this version."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransferFailed(f"the other side does not speak this protocol: {error}") from error


def proof(token: bytes, hello: Hello, challenge: Challenge) -> bytes:
    """Return what the dialer proves with."""
    return _mac(token, b"dialer", hello, challenge)


def welcome_proof(
    token: bytes, hello: Hello, challenge: Challenge, layout: KvLayout, num_blocks: int
) -> bytes:
    """Return what the owner proves with; it covers the description of the pool."""
    return _mac(token, b"owner", hello, challenge, layout, num_blocks)


def same(left: bytes, right: bytes) -> bool:
    """Compare two proofs in constant time."""
    return hmac.compare_digest(left, right)


def _mac(token: bytes, *said: object) -> bytes:
    return hmac.digest(token, _encode([_LABEL, VERSION, *said]), "sha256")


def pack_ids(block_ids: Sequence[int]) -> bytes:
    """Return block ids as little-endian u32."""
    return struct.pack(f"<{len(block_ids)}I", *block_ids)


def unpack_ids(packed: bytes) -> tuple[int, ...]:
    """Return packed block ids. Raises TransferFailed when a part of one is missing."""
    if len(packed) % 4:
        raise TransferFailed(f"{len(packed)} bytes are no list of block ids")
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def refusal(reason: str) -> Refusal:
    """Return a refusal of bounded length."""
    return Refusal(reason[:_MAX_REASON])


def printable(words: str) -> str:
    """Return a stranger's words, safe to log."""
    return "".join(c if c.isprintable() else "?" for c in words[:_MAX_REASON])

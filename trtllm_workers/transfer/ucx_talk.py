"""What two ends of a ucx link say to each other where no one-sided wire reaches. Pure; moves nothing.

    reader or writer                 owner
    Hello ────────────────────────▶  makes an endpoint back
          ◀──────────────── Welcome
    (posts receipts) Read ────────▶
          ◀═══════════ one message per segment
    Write ────────────────────────▶  (posts receipts)
          ◀────────────────── Ready
    one message per segment ══════▶
          ◀─────────────────── Done  all is in the owner's memory
    Notify ───────────────────────▶  has told its event loop
          ◀─────────────────── Done

A connection carries one operation at a time. Whatever goes wrong ends it: then the one that notices
closes its endpoint, and the other one is told by UCX.
"""

from __future__ import annotations

from typing import Final

import msgspec

from trtllm_workers.transfer.ucx_pieces import Pieces

CONTROL_TAG: Final = 0x74726B77  # of everything below; segments have tags of their own
MAX_MESSAGE_BYTES: Final = 1 << 20  # of a notification
MAX_CONTROL_BYTES: Final = MAX_MESSAGE_BYTES + 65536


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Begins connection ``conn``, a random number; answers go to the worker at ``reply_address``."""

    token: bytes
    conn: int
    peer_id: str
    reply_address: bytes


class Read(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Send these ranges of your pool as messages with ``data_tag``; give up after ``within_s``."""

    token: bytes
    conn: int
    data_tag: int
    offsets: list[int]
    lengths: list[int]
    within_s: float


class Write(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Let me fill these ranges of your pool; nothing lands there once ``within_s`` is over."""

    token: bytes
    conn: int
    offsets: list[int]
    lengths: list[int]
    within_s: float


class Notify(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Give this to whoever listens."""

    token: bytes
    conn: int
    message: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """The token of Hello is ours."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Send what you write as messages with ``data_tag``."""

    data_tag: int


class Done(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """What was asked is done."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """What was asked is not done, nothing of it."""

    reason: str


Ask = Hello | Read | Write | Notify
Answer = Welcome | Ready | Done | Refused

decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
encode = msgspec.msgpack.encode


def segments_of_pool(ask: Read | Write, base: int, length: int) -> Pieces | str:
    """Return where in our pool the messages of an operation begin, or what is wrong with it."""
    if len(ask.offsets) != len(ask.lengths):
        return f"{len(ask.offsets)} offsets with {len(ask.lengths)} lengths"
    for offset, size in zip(ask.offsets, ask.lengths, strict=True):
        if size <= 0 or offset < 0 or offset + size > length:
            return f"{size} bytes at {offset} are outside the pool of {length} bytes"
    return Pieces([base + offset for offset in ask.offsets], ask.offsets, ask.lengths).segments()

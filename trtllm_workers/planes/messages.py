"""The messages of the request plane, as values. How they become bytes is in ``frames.py``.

From the ingress: Submit, Abort. From a worker: Tokens, WorkerStats, Drain. Both ways: Ping, Pong.
The handshake (Hello, Proof) belongs to the mesh and never reaches its users.
"""

from __future__ import annotations

import msgspec

from trtllm_workers.types import Address, EngineStats, GenerateRequest, TokenChunk


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    """Generate. Tokens go to ``reply_to`` under ``stream``, a number of the ingress's choosing."""

    stream: int
    request: GenerateRequest
    reply_to: Address


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """Stop these streams of ``reply_to``; unknown ones are ignored."""

    streams: list[int]
    reply_to: Address


class Tokens(msgspec.Struct, frozen=True, tag="tokens", array_like=True):
    """What one engine step made for one ingress.

    ``streams`` and ``tokens`` are unsigned 32-bit little-endian columns of equal length: one token
    each, nothing else to say (the common case, so it costs 8 bytes). ``rich`` holds every other
    chunk: first ones, last ones, several tokens, logprobs, errors. Columns come before ``rich``.
    """

    streams: bytes
    tokens: bytes
    rich: list[tuple[int, TokenChunk]]


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True):
    """Are you there? Answered by Pong with the same number."""

    number: int


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True):
    """Yes."""

    number: int


class Drain(msgspec.Struct, frozen=True, tag="drain", array_like=True):
    """The sender takes no new requests; running ones finish."""

    reason: str


class WorkerStats(msgspec.Struct, frozen=True, tag="stats", array_like=True):
    """A worker's load, told to every connected ingress about once a second.

    ``num_frames`` counts the Tokens messages sent so far: one per engine step and ingress.
    """

    worker_id: str
    stats: EngineStats
    num_frames: int


Message = Submit | Abort | Tokens | Ping | Pong | Drain | WorkerStats

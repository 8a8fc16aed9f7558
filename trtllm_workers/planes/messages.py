"""The messages of the request plane, as values. How they become bytes is in ``frames.py``.

From the ingress: Submit, Abort, StatsAsk, EventsAsk. From a worker: Tokens, WorkerStats, KvEvents, Drain.
From whoever closes a deployment: StopAsk. Both ways: Ping, Pong.
The handshake (Hello, Proof) belongs to the mesh and never reaches its users.

Between a decode and a prefill worker, for each handoff::

    decode                              prefill
      │ ── PrefillAsk ─────────────────▶ │       decode_first only
      │ ◀──────── PrefillRefused | Offer │       prefill_first: the Offer carries the Submit
      │ ── Fetching ───────────────────▶ │
      │ (reads the blocks)               │
      │ ── Fetched ────────────────────▶ │       or CancelHandoff, at any time
      │ ◀────────────────────── Released │       says whether the blocks were pinned all along

and before the first one: PairAsk, PairAnswer; then PairReady, once its tokens were found right.

With a prefill queue the decode worker puts a PrefillJob there, and whoever has taken it asks for it::

    prefill                             decode
      │ ── FillAsk ────────────────────▶ │
      │ ◀──────── FillRefused | FillGrant │
      │ (reads cached blocks)             │
      │ ── FillKeep ───────────────────▶ │       only if it has read any
      │ ◀─────────────────────── FillKept │
      │ (computes, writes the blocks)     │
      │ ── Filled ─────────────────────▶ │       or FillStopped, at any time after the grant
      │ ◀───────────────────── FillAnswer │
      │ ◀───────────────────── FillCancel │       at any time; FillStopped or Filled follows

Those for images are in ``media_messages.py``.
"""

from __future__ import annotations

import msgspec

from trtllm_workers.planes.media_messages import (
    EncodeAsk,
    Encoded,
    EncodeDone,
    EncodeFailed,
    MediaAsk,
    MediaFetched,
    MediaGrant,
    MediaRefused,
    MediaReleased,
    MediaStats,
)
from trtllm_workers.types import (
    Address,
    EngineStats,
    GenerateRequest,
    KvEvent,
    Prefilled,
    TokenChunk,
    TransportCard,
)


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    """Generate. Tokens go to ``reply_to`` under ``stream``, a number of the ingress's choosing.

    ``decode`` is set when the receiver shall prefill and hand over to that worker, which then streams
    to ``reply_to`` itself (strategy prefill_first). ``prefill`` is the prefill worker that a decode worker
    shall ask, if it can (strategy decode_first, chosen by the router).
    """

    stream: int
    request: GenerateRequest
    reply_to: Address
    decode: Address | None = None
    prefill: Address | None = None


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


class StatsAsk(msgspec.Struct, frozen=True, tag="stats?", array_like=True):
    """Send WorkerStats now, and from now on."""


class EventsAsk(msgspec.Struct, frozen=True, tag="events?", array_like=True):
    """Send KvEvents: a snapshot first, then every change. Asked again, it begins anew.

    ``turn`` is a number of the asker's choosing, other than in its earlier asks.
    """

    turn: int


class KvEvents(msgspec.Struct, frozen=True, tag="events", array_like=True):
    """Changes of the sender's prefix cache, in order, for the EventsAsk of that ``turn``."""

    turn: int
    events: list[KvEvent]


class StopAsk(msgspec.Struct, frozen=True, tag="stop", array_like=True):
    """End: drain for up to so many seconds, then abort what is left. Answered by Drain."""

    drain_timeout_s: float
    reason: str


class PairAsk(msgspec.Struct, frozen=True, tag="pair", array_like=True):
    """A decode worker wants to fetch blocks from the receiver.

    ``cards`` are those of its transports, the best first; none: its engine moves KV itself.
    """

    model_id: str
    cards: list[TransportCard]


class PairAnswer(msgspec.Struct, frozen=True, tag="paired", array_like=True):
    """The prefill worker's side of a pair, or why there is none (an error's code and message).

    ``cards`` are those of its transports that the decode worker has too.
    """

    model_id: str
    cards: list[TransportCard]
    error_code: str = ""
    error_message: str = ""


class PairReady(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The decode worker takes blocks of the receiver from now on, or does not any more."""

    ready: bool


class PrefillAsk(msgspec.Struct, frozen=True, tag="prefill", array_like=True):
    """Prefill this and offer the blocks. ``handoff`` is a name of the decode worker's choosing."""

    handoff: str
    request: GenerateRequest


class PrefillRefused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """There will be no offer: an error's code, message and perhaps request field."""

    handoff: str
    code: str
    message: str
    param: str | None = None


class Offer(msgspec.Struct, frozen=True, tag="offer", array_like=True):
    """The prompt is computed; its blocks stay pinned for ``timeout_s`` seconds from now.

    ``submit`` is set when no ask came before it: the decode worker learns of the request here.
    """

    handoff: str
    prefilled: Prefilled
    timeout_s: float
    submit: Submit | None = None


class Fetching(msgspec.Struct, frozen=True, tag="fetching", array_like=True):
    """The decode worker begins to read the blocks of a handoff."""

    handoff: str


class Fetched(msgspec.Struct, frozen=True, tag="fetched", array_like=True):
    """The decode worker has read ``num_bytes`` in ``seconds``; were the blocks pinned throughout?"""

    handoff: str
    num_bytes: int
    seconds: float


class Released(msgspec.Struct, frozen=True, tag="released", array_like=True):
    """The pins are gone. Without ``valid`` they were gone too early: what was read is void."""

    handoff: str
    valid: bool


class CancelHandoff(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """The decode worker does not want the blocks (any more) and does not read them."""

    handoff: str
    reason: str


class PrefillJob(msgspec.Struct, frozen=True, array_like=True):
    """A prompt to compute, as it lies in the prefill queue. Tells nothing that its server should not know.

    Prompt, blocks and cards are told by ``decode``, to a worker that has taken the job and holds the
    cluster secret. ``num_cached_blocks`` of ``num_tokens`` lie there already. It is wanted for
    ``timeout_s`` from when it was put, at ``put_at_s`` by the clock of decode's host (Unix time): only a
    hint, as the two clocks may differ.
    """

    version: int
    job: str
    decode: Address
    num_tokens: int
    num_cached_blocks: int
    timeout_s: float
    put_at_s: float


class FillAsk(msgspec.Struct, frozen=True, tag="fill?", array_like=True):
    """The prefill worker has taken this job of the receiver's from the queue, and would do it."""

    job: str


class FillGrant(msgspec.Struct, frozen=True, tag="grant", array_like=True):
    """Compute this prompt and write its KV into these blocks, within ``timeout_s`` from now.

    The first ``num_cached_blocks`` must not be written; they may be read. ``cards`` are those of the
    decode worker's transports, the best first. An engine that moves its own KV names neither: the
    prefill worker then makes an Offer for ``job``.
    """

    job: str
    request: GenerateRequest
    block_ids: tuple[int, ...]
    num_cached_blocks: int
    cards: list[TransportCard]
    timeout_s: float


class FillRefused(msgspec.Struct, frozen=True, tag="no grant", array_like=True):
    """Not now: ask again after ``retry_s``; below 0: never, the job is done or not wanted any more."""

    job: str
    retry_s: float
    reason: str


class FillKeep(msgspec.Struct, frozen=True, tag="keep?", array_like=True):
    """The prefill worker has read cached blocks: were they what they are now, all along?"""

    job: str


class FillKept(msgspec.Struct, frozen=True, tag="kept", array_like=True):
    """Without ``valid`` the blocks may have been somebody else's: what was read is void."""

    job: str
    valid: bool


class Filled(msgspec.Struct, frozen=True, tag="filled", array_like=True):
    """All blocks are written: ``num_bytes`` in ``seconds``. ``first`` is the first token.

    With a ``finish_reason`` in it the request ended there, and nothing was written.
    """

    job: str
    first: TokenChunk
    num_bytes: int
    seconds: float
    queue_s: float
    compute_s: float


class FillAnswer(msgspec.Struct, frozen=True, tag="fill.", array_like=True):
    """The job is over. Without ``valid`` what was written is not used."""

    job: str
    valid: bool


class FillCancel(msgspec.Struct, frozen=True, tag="fill-", array_like=True):
    """Stop writing, and say so."""

    job: str
    reason: str


class FillStopped(msgspec.Struct, frozen=True, tag="stopped", array_like=True):
    """No byte of this job moves any more. With an error's code nobody else need try it."""

    job: str
    code: str = ""
    message: str = ""


class PairStats(msgspec.Struct, frozen=True, array_like=True):
    """What a decode worker has seen of one prefill worker. Counters only grow.

    ``state``: checking, ready, refused, mismatch or lost. ``bytes`` and ``seconds`` are of block
    transfers, ``gb_per_s`` (10^9 bytes) is measured over recent ones.
    """

    peer: Address
    transport: str
    wire: str
    state: str
    reason: str = ""
    num_handoffs: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    gb_per_s: float = 0.0
    canary_passed: int = 0
    canary_failed: int = 0
    canary_mismatched: int = 0


class HandoffStats(msgspec.Struct, frozen=True, array_like=True):
    """A worker's handoffs so far. Counters only grow.

    ``ended`` counts (state, cause), ``fallbacks`` counts causes of local prefill that was meant to be
    remote, ``local`` prompts computed here because their uncached part was short. ``phases`` holds
    what is new since the last message: seconds of (queue, prefill, transfer, first decode).

    With a prefill queue: ``queue_jobs`` counts jobs by outcome, ``redelivered`` jobs that were taken a
    second time or more, ``queue_depth`` is what the queue held last (-1: not known), ``queue_waits``
    holds new seconds between put and grant.
    """

    offered: int = 0
    fetching: int = 0
    ended: list[tuple[str, str, int]] = []
    fallbacks: list[tuple[str, int]] = []
    local: int = 0
    phases: list[tuple[float, float, float, float]] = []
    leaked_blocks: int = 0
    queue_jobs: list[tuple[str, int]] = []
    redelivered: int = 0
    queue_depth: int = -1
    queue_waits: list[float] = []


class WorkerStats(msgspec.Struct, frozen=True, tag="stats", array_like=True):
    """A worker's load, told about once a second to everybody who asked for it (StatsAsk).

    ``num_frames`` counts the Tokens messages sent so far: one per engine step and ingress. ``pairs``
    are a decode worker's; they are told at once when one changes its state. ``media``: None of a worker
    that takes text only.
    """

    worker_id: str
    stats: EngineStats
    num_frames: int
    handoffs: HandoffStats = HandoffStats()
    pairs: list[PairStats] = []
    media: MediaStats | None = None


Message = (
    Submit
    | Abort
    | Tokens
    | Ping
    | Pong
    | Drain
    | WorkerStats
    | StatsAsk
    | EventsAsk
    | KvEvents
    | StopAsk
    | PairAsk
    | PairAnswer
    | PairReady
    | PrefillAsk
    | PrefillRefused
    | Offer
    | Fetching
    | Fetched
    | Released
    | CancelHandoff
    | FillAsk
    | FillGrant
    | FillRefused
    | FillKeep
    | FillKept
    | Filled
    | FillAnswer
    | FillCancel
    | FillStopped
    | EncodeAsk
    | Encoded
    | EncodeFailed
    | EncodeDone
    | MediaAsk
    | MediaGrant
    | MediaRefused
    | MediaFetched
    | MediaReleased
)

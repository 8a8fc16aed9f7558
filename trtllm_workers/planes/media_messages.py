"""The messages of the request plane that are about images; see ``messages.py`` for the others.

Images become items at a worker that encodes, and whoever computes their prompt fetches the bytes there::

    ingress            encodes                worker that computes the prompt
      │ ── EncodeAsk ──▶ │                      │
      │ ◀─────── Encoded │  or EncodeFailed     │
      │ ── Submit, with the items ────────────▶ │
      │                  │ ◀────────── MediaAsk │   unless the two are one
      │                  │ MediaGrant ────────▶ │   or MediaRefused
      │                  │       (reads blocks) │
      │                  │ ◀────── MediaFetched │
      │                  │ MediaReleased ─────▶ │   says whether the blocks stayed what they were
      │ ── EncodeDone ─▶ │                      │   the items may go; at any time after EncodeAsk
"""

from __future__ import annotations

import msgspec

from trtllm_workers.types import MediaItem, MediaReference, TransportCard


class EncodeAsk(msgspec.Struct, frozen=True, tag="encode?", array_like=True):
    """Make items of these references, in order, within ``timeout_s``, and keep them until EncodeDone.

    ``ask`` is a number of the asker's choosing. Of the items, ``offset`` means nothing yet. When the
    connection ends, so does the asker's claim to them.
    """

    ask: int
    references: list[MediaReference]
    timeout_s: float


class Encoded(msgspec.Struct, frozen=True, tag="encoded", array_like=True):
    """The items: a list for each reference, as a file of embeddings may hold several images.

    ``num_cached`` of them were there already.
    """

    ask: int
    items: list[list[MediaItem]]
    num_cached: int = 0


class EncodeFailed(msgspec.Struct, frozen=True, tag="encode!", array_like=True):
    """There are no items: an error's code and message, and the request field at fault."""

    ask: int
    code: str
    message: str
    param: str | None = None


class EncodeDone(msgspec.Struct, frozen=True, tag="encode.", array_like=True):
    """The asker does not need these items (any more), whether or not they are made."""

    ask: int


class MediaAsk(msgspec.Struct, frozen=True, tag="media?", array_like=True):
    """The sender wants the bytes of these items of the receiver's.

    ``ask`` is a name of the sender's choosing; ``cards`` are those of its media transports, the best first.
    """

    ask: str
    digests: list[bytes]
    cards: list[TransportCard]


class MediaGrant(msgspec.Struct, frozen=True, tag="media", array_like=True):
    """Read these blocks, a list an item, within ``timeout_s`` from now; they stay what they are so long.

    ``cards`` are those of the holder's media transports that the asker has too, the best first.
    """

    ask: str
    block_ids: list[list[int]]
    cards: list[TransportCard]
    timeout_s: float


class MediaRefused(msgspec.Struct, frozen=True, tag="media!", array_like=True):
    """There is nothing to read: an error's code and message."""

    ask: str
    code: str
    message: str


class MediaFetched(msgspec.Struct, frozen=True, tag="media.", array_like=True):
    """The asker reads no more: it has all, or gave up."""

    ask: str


class MediaReleased(msgspec.Struct, frozen=True, tag="media-", array_like=True):
    """The blocks are free to change. Without ``valid`` they were so too early: what was read is void."""

    ask: str
    valid: bool


class MediaFlow(msgspec.Struct, frozen=True, array_like=True):
    """What a worker has fetched from one other: ``wire`` is what was seen to carry the bytes."""

    peer: str
    transport: str
    wire: str
    num_fetches: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class MediaStats(msgspec.Struct, frozen=True, array_like=True):
    """A worker's images. Counters only grow.

    ``items`` counts those that ingresses asked for by how they came to be: encoded by the vision tower,
    taken from a file, cached. ``failures`` counts (encode or fetch, error code). ``num_hits`` and
    ``num_misses`` count images of prompts that were here, and that were not. Now: ``num_kept`` items are
    here, ``num_pinned`` of them in use; ``free_bytes`` of their memory hold nothing, ``claimed_bytes`` are
    being filled.
    """

    items: list[tuple[str, int]] = []
    encode_seconds: float = 0.0
    failures: list[tuple[str, str, int]] = []
    num_hits: int = 0
    num_misses: int = 0
    flows: list[MediaFlow] = []
    num_kept: int = 0
    num_pinned: int = 0
    free_bytes: int = 0
    claimed_bytes: int = 0

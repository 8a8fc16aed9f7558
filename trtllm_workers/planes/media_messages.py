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

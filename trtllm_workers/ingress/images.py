"""The images of one request: their items, who keeps them, and making them again when they are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from trtllm_workers.errors import Unavailable
from trtllm_workers.ingress.encoders import Claim, Encoders
from trtllm_workers.ingress.served import Served
from trtllm_workers.types import MediaItem, MediaReference, VisionInfo


class Images:
    """Call ``encode`` first, ``placed`` once their offsets are known, and ``close`` in any case.

    ``vision`` is what the model's workers know of images; ``timeout_s`` bounds each encoding.
    """

    def __init__(
        self,
        encoders: Encoders,
        served: Served,
        references: Sequence[MediaReference],
        vision: VisionInfo,
        timeout_s: float,
    ) -> None:
        self.vision = vision
        self._encoders = encoders
        self._served = served
        self._references = references
        self._timeout_s = timeout_s
        self._claim: Claim | None = None
        self._media: tuple[MediaItem, ...] = ()
        self._renewing = asyncio.Lock()

    async def encode(self) -> Sequence[Sequence[MediaItem]]:
        """Return the items of every reference, without offsets. Raises as Encoders.encode."""
        self._claim = await self._encoders.encode(self._served, self._references, self._timeout_s)
        return self._claim.items

    def placed(self, media: tuple[MediaItem, ...]) -> None:
        """Take the items in the order and places that they have in the prompt."""
        self._media = media

    async def renewed(self, media: tuple[MediaItem, ...], *, gone: bool) -> tuple[MediaItem, ...]:
        """Return the items as they can be had now, for a stream that was sent with ``media``.

        They are made again when their holder is lost, or has them no longer (``gone``); for several
        streams only once. Raises Unavailable when an image shows something else by now: what was answered
        so far would not fit it.
        """
        async with self._renewing:
            claim = self._claim
            assert claim is not None, "streams are sent after the images were encoded"
            if claim.holds and not (gone and media is self._media):
                return self._media
            avoid = claim.worker if gone else None
            again = await self._encoders.encode(
                self._served, self._references, self._timeout_s, avoid
            )
            self._claim = again
            claim.done()
            items = [item for of_one in again.items for item in of_one]
            if [_shown(item) for item in items] != [_shown(item) for item in self._media]:
                raise Unavailable(
                    "an image of the request shows something else now than when it was read first; "
                    "send the request again"
                )
            self._media = tuple(
                msgspec.structs.replace(item, offset=old.offset)
                for item, old in zip(items, self._media, strict=True)
            )
            return self._media

    def close(self) -> None:
        """Let the items go."""
        if self._claim is not None:
            self._claim.done()


def _shown(item: MediaItem) -> tuple[object, ...]:
    return item.digest, item.num_tokens, item.grid

"""The holder's side of items: pins them while another worker reads. Moves no bytes itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from trtllm_workers.errors import LaunchError, LayoutMismatch, MediaGone, PeerLost
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.media_messages import (
    MediaAsk,
    MediaFetched,
    MediaGrant,
    MediaRefused,
    MediaReleased,
)
from trtllm_workers.planes.messages import Message
from trtllm_workers.transfer.base import KvTransport, check_layouts
from trtllm_workers.transfer.handoff import handoff_timeout_s
from trtllm_workers.transfer.media_store import Entry, MediaStore
from trtllm_workers.types import TransportCard

log = structlog.get_logger(__name__)

# What the deadline of a read assumes; it has ten times as long, and the shortest time beside it.
_BYTES_PER_S = 250e6


@dataclass(slots=True, eq=False)
class _Grant:
    peer: Peer
    ask: str
    entries: list[Entry]
    timer: asyncio.TimerHandle


class MediaGrants:
    """Items of one store that others read. They stay what they are until the reader has done, is lost, or
    is too late; and the reader is told whether they did.
    """

    def __init__(
        self,
        worker_id: str,
        store: MediaStore,
        transports: Sequence[KvTransport],
        *,
        min_timeout_s: float,
        max_timeout_s: float,
    ) -> None:
        self._worker_id = worker_id
        self._store = store
        self._transports = transports
        self._min_timeout_s = min_timeout_s
        self._max_timeout_s = max_timeout_s
        self._grants: dict[tuple[str, str, str], _Grant] = {}

    @property
    def num_open(self) -> int:
        """Reads that have not ended."""
        return len(self._grants)

    def ask(self, peer: Peer, message: MediaAsk) -> None:
        """Let a worker read, or say why not; also while draining."""
        try:
            cards = self._cards(peer, message.cards)
            entries = self._pin(peer, message)
        except LaunchError as error:
            _send(peer, MediaRefused(message.ask, error.code or "", str(error)))
            return
        timeout_s = handoff_timeout_s(
            sum(entry.item.num_bytes for entry in entries),
            _BYTES_PER_S,
            min_timeout_s=self._min_timeout_s,
            max_timeout_s=self._max_timeout_s,
        )
        key = _key(peer, message.ask)
        timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, key)
        self._grants[key] = _Grant(peer, message.ask, entries, timer)
        block_ids = [entry.block_ids for entry in entries]
        _send(peer, MediaGrant(message.ask, block_ids, cards, timeout_s))

    def _cards(self, peer: Peer, theirs: Sequence[TransportCard]) -> list[TransportCard]:
        ours = {transport.name: transport for transport in self._transports}
        cards: list[TransportCard] = []
        for card in theirs:
            transport = ours.get(card.transport)
            if transport is not None:
                cards.append(transport.card())
                try:
                    check_layouts(cards[-1].layout, card.layout, peer.address.peer_id)
                except LayoutMismatch:
                    raise LayoutMismatch(
                        f"embeddings of worker {self._worker_id} do not fit {peer.address.peer_id}: rows of "
                        f"{cards[-1].layout.head_dim} {cards[-1].layout.dtype} here, of "
                        f"{card.layout.head_dim} {card.layout.dtype} there; both need the same model"
                    ) from None
        if not cards:
            raise LayoutMismatch(
                f"worker {self._worker_id} moves images by {', '.join(ours) or 'nothing'}, "
                f"{peer.address.peer_id} by {', '.join(card.transport for card in theirs) or 'nothing'}; "
                "give both the same --kv-transport"
            )
        return cards

    def _pin(self, peer: Peer, message: MediaAsk) -> list[Entry]:
        if _key(peer, message.ask) in self._grants:
            raise LaunchError(f"ask {message.ask} is under way already")
        entries: list[Entry] = []
        for digest in message.digests:
            entry = self._store.pin(digest)
            if entry is None:
                for pinned in entries:
                    self._store.unpin(pinned)
                raise MediaGone(f"an image is not (any more) at worker {self._worker_id}")
            entries.append(entry)
        return entries

    # --- the end of a read ---------------------------------------------------------------------

    def fetched(self, peer: Peer, message: MediaFetched) -> None:
        """Release the items, and say whether they were pinned until now."""
        grant = self._end(_key(peer, message.ask))
        _send(peer, MediaReleased(message.ask, grant is not None))

    def peer_lost(self, peer: Peer) -> None:
        """Release what a worker was reading that is gone."""
        for key, grant in list(self._grants.items()):
            if grant.peer is peer:
                self._end(key)

    def _expire(self, key: tuple[str, str, str]) -> None:
        grant = self._end(key)
        if grant is not None:
            log.warning(
                "images were not read in time; they may go",
                peer=grant.peer.address.peer_id,
                items=len(grant.entries),
            )
            _send(grant.peer, MediaReleased(grant.ask, False))

    def _end(self, key: tuple[str, str, str]) -> _Grant | None:
        grant = self._grants.pop(key, None)
        if grant is not None:
            grant.timer.cancel()
            for entry in grant.entries:
                self._store.unpin(entry)
        return grant

    def close(self) -> None:
        """Release everything, and say so: what is read from now on is void."""
        for key, grant in list(self._grants.items()):
            self._end(key)
            _send(grant.peer, MediaReleased(grant.ask, False))


def _key(peer: Peer, ask: str) -> tuple[str, str, str]:
    return peer.address.peer_id, peer.address.incarnation, ask


def _send(peer: Peer, message: Message) -> None:
    try:
        peer.send(message)
    except PeerLost:
        return  # peer_lost tells the rest

"""Ways to the media stores of other workers: made once for each, and kept while they work. Knows no image."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog

from trtllm_workers.errors import TransferFailed
from trtllm_workers.planes.base import Peer
from trtllm_workers.transfer.base import KvLink, KvTransport
from trtllm_workers.types import TransportCard

log = structlog.get_logger(__name__)

CONNECT_TIMEOUT_S = 10.0
TRY_TIMEOUT_S = 3.0  # for a transport behind which there is another one


class Way:
    """A link to one worker's store, and by which transport."""

    def __init__(self, transport: str, link: KvLink) -> None:
        self.transport = transport
        self.link = link


class _Shared:
    def __init__(self, making: asyncio.Task[Way]) -> None:
        self.making = making
        self.num_users = 0
        self.dropped = False


class MediaLinks:
    """One way to each worker; the best transport that both have and that has a wire between them."""

    def __init__(self, transports: Sequence[KvTransport]) -> None:
        self._transports = transports
        self._ways: dict[tuple[str, str], _Shared] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def cards(self) -> list[TransportCard]:
        """Ours, the best first."""
        return [transport.card() for transport in self._transports]

    @property
    def num_ways(self) -> int:
        """Ways that are there, are being made, or are being closed."""
        return len(self._ways) + len(self._closing)

    @asynccontextmanager
    async def way(self, peer: Peer, cards: Sequence[TransportCard]) -> AsyncIterator[Way]:
        """Use the way to ``peer``; one over which something failed is not given to anybody else.

        Raises TransferFailed and LayoutMismatch when there is none.
        """
        key = (peer.address.peer_id, peer.address.incarnation)
        shared = self._ways.get(key)
        if shared is None:
            making = asyncio.create_task(self._connect(peer, cards), name=f"media link {key[0]}")
            shared = self._ways[key] = _Shared(making)
        shared.num_users += 1
        try:
            yield await asyncio.shield(shared.making)
        except BaseException as error:
            # One who only left, and did not find it broken, leaves it to the others.
            if not isinstance(error, asyncio.CancelledError):
                self._drop(key, shared)
            raise
        finally:
            shared.num_users -= 1
            if shared.dropped and not shared.num_users:
                self._close(shared)

    async def _connect(self, peer: Peer, cards: Sequence[TransportCard]) -> Way:
        offered = {card.transport: card for card in cards}
        common = [transport for transport in self._transports if transport.name in offered]
        for transport in common:
            timeout_s = CONNECT_TIMEOUT_S if transport is common[-1] else TRY_TIMEOUT_S
            try:
                link = await transport.connect(offered[transport.name], timeout_s)
            except TransferFailed as error:
                if transport is common[-1]:
                    raise
                log.warning(
                    "transport does not reach another worker's images; trying the next",
                    peer=peer.address.peer_id,
                    transport=transport.name,
                    reason=str(error),
                )
            else:
                log.info(
                    "images of another worker reached",
                    peer=peer.address.peer_id,
                    transport=transport.name,
                    wire=link.wire,
                )
                return Way(transport.name, link)
        raise TransferFailed(
            f"worker {peer.address.peer_id} and this one have no transport in common: it has "
            f"{', '.join(offered) or 'none'}, this one "
            f"{', '.join(transport.name for transport in self._transports) or 'none'}; give both the same "
            "--kv-transport"
        )

    def forget(self, peer: Peer) -> None:
        """Close the way to a worker that is gone, once nobody reads there."""
        key = (peer.address.peer_id, peer.address.incarnation)
        shared = self._ways.get(key)
        if shared is not None:
            self._drop(key, shared)
            if not shared.num_users:
                self._close(shared)

    def _drop(self, key: tuple[str, str], shared: _Shared) -> None:
        shared.dropped = True
        if self._ways.get(key) is shared:
            del self._ways[key]

    def _close(self, shared: _Shared) -> None:
        closing = asyncio.create_task(_closed(shared.making))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all of them; nobody reads any more."""
        ways, self._ways = list(self._ways.values()), {}
        for shared in ways:
            self._close(shared)
        await asyncio.gather(*self._closing, return_exceptions=True)


async def _closed(making: asyncio.Task[Way]) -> None:
    making.cancel()
    await asyncio.wait((making,))
    if not making.cancelled() and making.exception() is None:
        await making.result().link.close()

"""One job of the prefill queue: read what decode has, compute the rest, write it into decode's blocks.

Whoever cancels ``Filler.fill`` may rely on it: when it has ended, no byte of the job moves. Knows no queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec
import structlog

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import (
    LaunchError,
    PeerLost,
    TransferFailed,
    Unavailable,
    error_for_code,
)
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.messages import Filled, FillGrant, FillKeep, FillRefused, PrefillJob
from trtllm_workers.planes.queue import Item
from trtllm_workers.transfer.base import KvLink, KvTransport
from trtllm_workers.types import (
    FinishReason,
    Prefilled,
    Reservation,
    TokenChunk,
    TransportCard,
)
from trtllm_workers.worker.handoff_job import now_s, settle
from trtllm_workers.worker.media_desk import MediaDesk

log = structlog.get_logger(__name__)
T = TypeVar("T")

# No single write lasts longer, so that one whose decode worker was lost has ended before the blocks
# are given away (``queued_prefill.FenceTimes.silent_s``).
WRITE_TIMEOUT_S = 10.0
_WRITE_BYTES = 64 << 20
_LINK_TIMEOUT_S = 10.0
_KEPT_TIMEOUT_S = 10.0


class Void(Exception):
    """The blocks are not ours (any more); what was done is of no use."""


class Failed(Exception):
    """This prompt cannot be filled by anybody, or not between these two workers."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Word(Generic[T]):
    """Something that the decode worker says once."""

    def __init__(self) -> None:
        self.future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def set(self, value: T) -> None:
        """Take it; only the first time counts."""
        settle(self.future, value)


class Fill:
    """One job that was taken.

    ``stop`` resolves when it shall not go on; ``until_s`` is its grant's end. ``num_uncomputed`` prompt
    tokens are still to be computed for it, as far as known.
    """

    def __init__(self, job: PrefillJob, item: Item, block_size: int) -> None:
        self.job = job
        self.item = item
        address = job.decode
        self.request_id = f"{address.peer_id}.{address.incarnation}/{job.job}"
        self.peer: Peer | None = None
        self.until_s = 0.0
        self.num_uncomputed = max(1, job.num_tokens - job.num_cached_blocks * block_size)
        self.answered: Word[FillGrant | FillRefused] = Word()
        self.kept: Word[bool] = Word()
        self.taken: Word[bool] = Word()
        self.stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stop_reason = ""

    def end(self, reason: str) -> None:
        """Stop it; the first reason counts."""
        if not self.stop.done():
            self.stop_reason = reason
            self.stop.set_result(None)

    async def hear(self, word: Word[T], timeout_s: float) -> T | None:
        """Return what the decode worker says; None when it is stopped or silent for so long."""
        await asyncio.wait(
            (word.future, self.stop), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        return word.future.result() if word.future.done() else None


class Filler:
    """Does jobs with this worker's engine and transports."""

    def __init__(self, engine: Engine, transports: Sequence[KvTransport], block_size: int) -> None:
        self._engine = engine
        self._transports = transports
        self._block_size = block_size
        self._links: dict[tuple[str, str], asyncio.Task[KvLink]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.media: MediaDesk | None = None  # of an engine that takes images

    async def fill(
        self, fill: Fill, peer: Peer, grant: FillGrant, computed: Callable[[], None]
    ) -> None:
        """Do the job and tell the decode worker. ``computed`` is called when the engine is done with it.

        Raises Failed and Void, and then nothing is pinned here and no byte moves.
        """
        try:
            await self._fill(fill, peer, grant, computed)
        except LaunchError as error:
            if isinstance(error, PeerLost):
                raise Void(str(error)) from error
            raise Failed(error.code or "engine_error", str(error)) from error
        finally:
            fill.num_uncomputed = 0
            self._engine.abort(fill.request_id)

    async def _fill(
        self, fill: Fill, peer: Peer, grant: FillGrant, computed: Callable[[], None]
    ) -> None:
        link = await self._link(peer, grant.cards)
        reservation = await self._reserve(fill, grant)
        num_filled = await self._read(fill, peer, grant, reservation, link)
        if grant.request.media and self.media is not None:
            async with self.media.here(grant.request.media):
                prefilled = await self._compute(fill, num_filled)
        else:
            prefilled = await self._compute(fill, num_filled)
        fill.num_uncomputed = 0
        computed()
        began_s = now_s()
        num_bytes = 0
        if prefilled.first.finish_reason is None:
            num_bytes = await self._write(fill, grant, prefilled, link)
        peer.send(
            Filled(
                fill.job.job,
                prefilled.first,
                num_bytes,
                now_s() - began_s,
                prefilled.queue_s,
                prefilled.compute_s,
            )
        )
        # Full blocks stay as prefix cache; an abort after this finds nothing.
        self._engine.release(fill.request_id)

    async def _reserve(self, fill: Fill, grant: FillGrant) -> Reservation:
        request = msgspec.structs.replace(grant.request, request_id=fill.request_id)
        reserved: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        self._engine.reserve(request, lambda told: settle(reserved, told))
        reservation = await reserved
        if reservation.ended is not None:
            raise _as_error(reservation.ended)
        if len(reservation.block_ids) != len(grant.block_ids):
            raise TransferFailed(
                f"{len(grant.block_ids)} blocks of decode for a prompt of {len(reservation.block_ids)}"
            )
        return reservation

    async def _read(
        self, fill: Fill, peer: Peer, grant: FillGrant, reservation: Reservation, link: KvLink
    ) -> int:
        """Read the cached blocks that only decode has; return how many leading blocks are here."""
        most = (len(grant.request.prompt_token_ids) - 1) // self._block_size
        have = min(reservation.num_cached_blocks, most)
        there = min(grant.num_cached_blocks, most)
        if there <= have:
            return have
        part = slice(have, there)
        await link.read(grant.block_ids[part], reservation.block_ids[part], self._left_s(fill))
        # They go into our prefix cache, so it must be certain that they were not given away meanwhile.
        peer.send(FillKeep(fill.job.job))
        if not await fill.hear(fill.kept, _KEPT_TIMEOUT_S):
            raise Void("the cached blocks may have changed while they were read")
        return there

    async def _compute(self, fill: Fill, num_filled: int) -> Prefilled:
        done: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        self._engine.prefill_reserved(fill.request_id, num_filled, lambda told: settle(done, told))
        prefilled = await done
        if prefilled.first.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise _as_error(prefilled.first)
        return prefilled

    async def _write(self, fill: Fill, grant: FillGrant, prefilled: Prefilled, link: KvLink) -> int:
        """Write what decode has not; return how many bytes that was."""
        pool = self._engine.kv_pool
        assert pool is not None, "a link needs a pool"
        block_bytes = pool.layout.block_bytes
        local = prefilled.block_ids[grant.num_cached_blocks :]
        remote = grant.block_ids[grant.num_cached_blocks :]
        per_write = max(1, _WRITE_BYTES // block_bytes)
        for first in range(0, len(local), per_write):
            part = slice(first, first + per_write)
            timeout_s = min(self._left_s(fill), WRITE_TIMEOUT_S)
            await link.write(local[part], remote[part], timeout_s)
        return len(local) * block_bytes

    def _left_s(self, fill: Fill) -> float:
        left_s = fill.until_s - now_s()
        if left_s <= 0 or fill.stop.done():
            raise Void("the time of the grant is over")
        return left_s

    # --- links ---------------------------------------------------------------------------------

    async def _link(self, peer: Peer, cards: Sequence[TransportCard]) -> KvLink:
        """Return the way to a decode worker's pool; made once per connection."""
        key = (peer.address.peer_id, peer.address.incarnation)
        making = self._links.get(key)
        if making is None or (making.done() and (making.cancelled() or making.exception())):
            making = self._links[key] = asyncio.create_task(self._connect(cards))
        return await asyncio.shield(making)

    async def _connect(self, cards: Sequence[TransportCard]) -> KvLink:
        offered = {card.transport: card for card in cards}
        common = [transport for transport in self._transports if transport.name in offered]
        for transport in common:
            try:
                return await transport.connect(offered[transport.name], _LINK_TIMEOUT_S)
            except TransferFailed as error:
                if transport is common[-1]:
                    raise
                log.warning(
                    "KV transport does not reach a decode worker; trying the next",
                    transport=transport.name,
                    reason=str(error),
                )
        raise TransferFailed("no KV transport that both workers have")

    def forget(self, peer: Peer) -> None:
        """Close the way to a decode worker that is gone."""
        making = self._links.pop((peer.address.peer_id, peer.address.incarnation), None)
        if making is not None:
            closing = asyncio.create_task(_close(making))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all links."""
        making, self._links = list(self._links.values()), {}
        await asyncio.gather(*map(_close, making), *self._closing, return_exceptions=True)


async def _close(making: asyncio.Task[KvLink]) -> None:
    making.cancel()
    await asyncio.wait((making,))
    if not making.cancelled() and making.exception() is None:
        await making.result().close()


def _as_error(ended: TokenChunk) -> LaunchError:
    error: LaunchError = Unavailable(ended.error_message or "the prefill worker gave the prompt up")
    if ended.error_code:
        error = error_for_code(ended.error_code, str(error), param=ended.error_param)
    return error

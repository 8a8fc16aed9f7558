"""Items of other workers on their way into this worker's store: asked for, read, confirmed. Knows no request."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

import structlog

from trtllm_workers.errors import (
    LaunchError,
    MediaGone,
    PeerLost,
    PlaneError,
    TransferFailed,
    error_for_code,
)
from trtllm_workers.planes.base import Peer, RequestPlane
from trtllm_workers.planes.media_messages import (
    MediaAsk,
    MediaFetched,
    MediaGrant,
    MediaRefused,
    MediaReleased,
)
from trtllm_workers.planes.messages import Message
from trtllm_workers.transfer.base import KvTransport
from trtllm_workers.transfer.media_store import Claim, Entry, MediaStore
from trtllm_workers.types import Address, MediaItem
from trtllm_workers.worker.handoff_job import settle
from trtllm_workers.worker.media_links import MediaLinks
from trtllm_workers.worker.media_meters import FETCH, MediaMeters
from trtllm_workers.worker.shared_work import SharedWork

log = structlog.get_logger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0

# What is the same when two fetches would be: the content, and whose it is.
Key = tuple[bytes, str, str]


class Fetch:
    """Items of one holder that come together.

    ``granted`` and ``released`` resolve with what the holder says, or with the error that makes it silent.
    """

    def __init__(self, ask: str, holder: Address, items: Sequence[MediaItem]) -> None:
        loop = asyncio.get_running_loop()
        self.ask = ask
        self.holder = holder
        self.items = items
        self.peer: Peer | None = None
        self.granted: asyncio.Future[MediaGrant | LaunchError] = loop.create_future()
        self.released: asyncio.Future[bool | LaunchError] = loop.create_future()


class MediaFetcher:
    """Brings items of others. Ends what it started in ``close``.

    Requests that want the same item of the same holder wait for one fetch. When the last of them leaves, it
    is given up; its memory is free once no byte moves any more.
    """

    def __init__(
        self,
        store: MediaStore,
        plane: RequestPlane,
        transports: Sequence[KvTransport],
        meters: MediaMeters,
        *,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._store = store
        self._plane = plane
        self._links = MediaLinks(transports)
        self._meters = meters
        self._answer_timeout_s = answer_timeout_s
        self._works: dict[Key, SharedWork[list[Entry]]] = {}
        self._fetches: dict[tuple[str, str, str], Fetch] = {}  # by holder and ask
        self._tasks: set[asyncio.Task[list[Entry]]] = set()
        self._numbers = itertools.count(1)

    @property
    def num_open(self) -> int:
        """Fetches whose bytes may move."""
        return len(self._tasks)

    @property
    def num_links(self) -> int:
        """Ways to other workers' stores."""
        return self._links.num_ways

    def begin(self, items: Iterable[MediaItem]) -> list[SharedWork[list[Entry]]]:
        """Return the work that brings these items, none of which is here; join it before anything else."""
        works: dict[int, SharedWork[list[Entry]]] = {}
        fresh: dict[tuple[str, str], list[MediaItem]] = {}
        for item in items:
            assert item.holder is not None, "only items that somebody has are fetched"
            work = self._works.get(_key(item))
            if work is not None:
                works[id(work)] = work
            else:
                fresh.setdefault((item.holder.peer_id, item.holder.incarnation), []).append(item)
        for several in fresh.values():
            work = self._start(several)
            works[id(work)] = work
        return list(works.values())

    def _start(self, items: Sequence[MediaItem]) -> SharedWork[list[Entry]]:
        keys = [_key(item) for item in items]

        def forget() -> None:
            for key in keys:
                if self._works.get(key) is work:
                    del self._works[key]

        work: SharedWork[list[Entry]] = SharedWork(self._let_go, forget)
        self._works.update(dict.fromkeys(keys, work))
        holder = items[0].holder
        assert holder is not None, "see begin"
        fetch = Fetch(str(next(self._numbers)), holder, items)
        work.start(self._run(fetch), f"fetch images {fetch.ask}")
        assert work.task is not None, "it was started"
        self._tasks.add(work.task)
        work.task.add_done_callback(self._tasks.discard)
        return work

    def _let_go(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._store.unpin(entry)

    # --- one fetch -----------------------------------------------------------------------------

    async def _run(self, fetch: Fetch) -> list[Entry]:
        """Return the items' entries, each pinned once. Raises MediaGone, Overloaded, LayoutMismatch."""
        try:
            return await self._bring(fetch)
        except LaunchError as error:
            if isinstance(error, PlaneError | TransferFailed):
                error = MediaGone(
                    f"the images of this request did not come from worker {fetch.holder.peer_id}: {error}"
                )
            self._meters.failed(FETCH, error.code or "")
            log.warning("images not fetched", holder=str(fetch.holder), reason=str(error))
            raise error from None

    async def _bring(self, fetch: Fetch) -> list[Entry]:
        key = (fetch.holder.peer_id, fetch.holder.incarnation, fetch.ask)
        claims: list[Claim] = []
        reads = False  # whether the holder may keep items for us
        try:
            peer = fetch.peer = await self._plane.connect(fetch.holder, CONNECT_TIMEOUT_S)
            self._fetches[key] = fetch
            for item in fetch.items:
                claims.append(self._store.claim(item.num_bytes))
            reads = True
            digests = [item.digest for item in fetch.items]
            peer.send(MediaAsk(fetch.ask, digests, self._links.cards))
            grant = await self._hear(fetch, fetch.granted)
            await self._read(peer, grant, claims)
            reads = False
            peer.send(MediaFetched(fetch.ask))
            if not await self._hear(fetch, fetch.released):
                raise MediaGone(
                    f"worker {fetch.holder.peer_id} had let the images of this request go before they were "
                    "read; what was read is dropped"
                )
            return [
                self._store.commit(claim, item)
                for claim, item in zip(claims, fetch.items, strict=True)
            ]
        finally:
            self._fetches.pop(key, None)
            for claim in claims:
                self._store.drop(claim)  # of one that was committed this does nothing
            if reads and fetch.peer is not None:
                _send(fetch.peer, MediaFetched(fetch.ask))

    async def _read(self, peer: Peer, grant: MediaGrant, claims: Sequence[Claim]) -> None:
        granted_s = time.monotonic()
        ours = [claim.block_ids for claim in claims]
        if [len(ids) for ids in grant.block_ids] != [len(ids) for ids in ours]:
            raise TransferFailed("it offers blocks of another number than the items take")
        remote = list(itertools.chain.from_iterable(grant.block_ids))
        local = list(itertools.chain.from_iterable(ours))
        async with self._links.way(peer, grant.cards) as way:
            began_s = time.monotonic()
            left_s = grant.timeout_s - (began_s - granted_s)
            if left_s <= 0:
                raise TransferFailed("the connection to its memory took too long")
            await way.link.read(remote, local, left_s)
            self._meters.fetched(
                peer.address.peer_id,
                way.transport,
                way.link.wire,
                sum(claim.num_bytes for claim in claims),
                time.monotonic() - began_s,
            )

    async def _hear(self, fetch: Fetch, said: asyncio.Future[T | LaunchError]) -> T:
        await asyncio.wait((said,), timeout=self._answer_timeout_s)
        if not said.done():
            raise MediaGone(
                f"worker {fetch.holder.peer_id}, which has the images of this request, was silent for "
                f"{self._answer_timeout_s:g} s"
            )
        answer = said.result()
        if isinstance(answer, LaunchError):
            raise answer
        return answer

    # --- news ----------------------------------------------------------------------------------

    def on_message(self, peer: Peer, message: MediaGrant | MediaRefused | MediaReleased) -> None:
        """Take a holder's word. One that comes too late was answered when the fetch was given up."""
        fetch = self._fetches.get((peer.address.peer_id, peer.address.incarnation, message.ask))
        if fetch is None or fetch.peer is not peer:
            return
        if isinstance(message, MediaGrant):
            settle(fetch.granted, message)
        elif isinstance(message, MediaRefused):
            settle(fetch.granted, error_for_code(message.code, message.message))
        else:
            settle(fetch.released, message.valid)

    def peer_lost(self, peer: Peer, error: PeerLost) -> None:
        """Give up what a worker was to bring that is gone; do not wait until a read notices."""
        self._links.forget(peer)
        lost = [fetch for fetch in self._fetches.values() if fetch.peer is peer]
        for fetch in lost:
            gone = MediaGone(
                f"worker {fetch.holder.peer_id}, which has the images of this request, was lost: {error}"
            )
            works = {self._works.get(_key(item)) for item in fetch.items}
            for work in works - {None}:
                assert work is not None, "see the line above"
                self._meters.failed(FETCH, MediaGone.code or "")
                work.fail(gone)

    async def close(self) -> None:
        """Give up everything; no byte moves afterwards."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._links.close()


def _key(item: MediaItem) -> Key:
    assert item.holder is not None, "only items that somebody has are fetched"
    return item.digest, item.holder.peer_id, item.holder.incarnation


def _send(peer: Peer, message: Message) -> None:
    try:
        peer.send(message)
    except PeerLost:
        return  # peer_lost tells the rest


def without_doubles(items: Iterable[MediaItem]) -> list[MediaItem]:
    """Return each content once: the same image may stand in a prompt twice."""
    return list({item.digest: item for item in items}.values())

"""Images of prompts that are computed here: brought into the engine's store before it is asked.

A request without images never comes here. Of the others those whose images are all here go on at once; the
rest wait for a fetch. The engine takes pins of its own when it is asked, so ours last until then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import structlog

from trtllm_workers.errors import EngineError, LaunchError, MediaGone, NotSupported, PeerLost
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
from trtllm_workers.transfer.media_store import Entry, MediaStore
from trtllm_workers.types import GenerateRequest, MediaItem
from trtllm_workers.worker.handoff_job import Aborted, settle
from trtllm_workers.worker.media_fetch import MediaFetcher, without_doubles
from trtllm_workers.worker.media_grants import MediaGrants
from trtllm_workers.worker.media_meters import MediaMeters

log = structlog.get_logger(__name__)


class MediaDesk:
    """Items of one engine's store: those that requests need here, and those that other workers read.

    ``min_timeout_s`` and ``max_timeout_s`` bound the deadline of a read.
    Ends what it started in ``close``; then nothing here is pinned or claimed, and no byte moves.
    """

    def __init__(
        self,
        worker_id: str,
        store: MediaStore,
        plane: RequestPlane,
        transports: Sequence[KvTransport],
        meters: MediaMeters,
        *,
        min_timeout_s: float = 5.0,
        max_timeout_s: float = 120.0,
    ) -> None:
        self._worker_id = worker_id
        self._store = store
        self._plane = plane
        self._meters = meters
        self.fetcher = MediaFetcher(store, plane, transports, meters)
        self.grants = MediaGrants(
            worker_id,
            store,
            transports,
            min_timeout_s=min_timeout_s,
            max_timeout_s=max_timeout_s,
        )
        self._waiting: dict[str, asyncio.Future[None]] = {}  # resolves when it is aborted
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        """Reads by other workers that have not ended."""
        return self.grants.num_open

    # --- requests ------------------------------------------------------------------------------

    def when_here(
        self,
        request: GenerateRequest,
        begin: Callable[[], None],
        failed: Callable[[LaunchError], None],
        aborted: Callable[[], None],
    ) -> None:
        """Call ``begin`` once all images of a request are here: at once if they are.

        Or one of the others: ``failed``, also when ``begin`` raises, and ``aborted`` after ``abort``.
        """
        try:
            entries = self._all_here(request.media)
            if entries is not None:
                try:
                    begin()
                finally:
                    self._unpin(entries)
                return
        except LaunchError as error:
            failed(error)
            return
        self._waiting[request.request_id] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(
            self._wait(request, begin, failed, aborted), name=f"images of {request.request_id}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wait(
        self,
        request: GenerateRequest,
        begin: Callable[[], None],
        failed: Callable[[LaunchError], None],
        aborted: Callable[[], None],
    ) -> None:
        request_id = request.request_id
        try:
            async with self.here(request.media, self._waiting[request_id]):
                del self._waiting[request_id]  # from now on it is the engine's
                begin()
        except Aborted:
            aborted()
        except LaunchError as error:
            failed(error)
        except Exception as error:  # the border: one request must not end the others
            log.exception("images of a request failed in the worker", request_id=request_id)
            failed(EngineError(f"internal error: {error!r}"))
        finally:
            self._waiting.pop(request_id, None)

    def abort(self, request_id: str) -> bool:
        """Abort a request that waits for its images; False when none does."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return False
        settle(waiting, None)
        return True

    @asynccontextmanager
    async def here(
        self, media: Sequence[MediaItem], aborted: asyncio.Future[None] | None = None
    ) -> AsyncIterator[None]:
        """Have these items in the store, and pinned, inside the block.

        Raises Aborted once ``aborted`` is resolved; MediaGone when the items are not where they were said to
        be (they can be made again); Overloaded without room for them; NotSupported for an engine's handle
        from another host.
        """
        entries = await self._bring(media, aborted)
        try:
            yield
        finally:
            self._unpin(entries)

    # --- bringing ------------------------------------------------------------------------------

    def _all_here(self, media: Sequence[MediaItem]) -> list[Entry] | None:
        """Return the pinned entries of all items, or None when some must be fetched."""
        entries, missing = self._pin_those_here(media)
        if not missing:
            self._meters.num_hits += len(entries)
            return entries
        self._unpin(entries)
        return None

    def _pin_those_here(self, media: Sequence[MediaItem]) -> tuple[list[Entry], list[MediaItem]]:
        entries: list[Entry] = []
        missing: list[MediaItem] = []
        try:
            for item in without_doubles(media):
                if item.native:
                    self._check_native(item)
                    continue
                entry = self._store.pin(item.digest)
                if entry is not None:
                    entries.append(entry)
                else:
                    self._check_holder(item)
                    missing.append(item)
        except LaunchError:
            self._unpin(entries)
            raise
        return entries, missing

    def _check_native(self, item: MediaItem) -> None:
        host = self._plane.address.host
        if item.holder is None or item.holder.host != host:
            where = f"on host {item.holder.host}" if item.holder is not None else "nowhere"
            raise NotSupported(
                f"the engine's handle of an image is good on one node only: it was made {where}, and worker "
                f"{self._worker_id} is on {host}; put encode and prefill workers on one node"
            )

    def _check_holder(self, item: MediaItem) -> None:
        holder = item.holder
        if holder is None:
            raise EngineError("an image of this request is said to be nowhere")
        if holder.peer_id == self._plane.address.peer_id:
            raise MediaGone(
                f"an image of this request is not at worker {self._worker_id} any more; it has to be made again"
            )

    async def _bring(
        self, media: Sequence[MediaItem], aborted: asyncio.Future[None] | None
    ) -> list[Entry]:
        entries, missing = self._pin_those_here(media)
        self._meters.num_hits += len(entries)
        self._meters.num_misses += len(missing)
        try:
            if missing:
                await self._fetch(missing, entries, aborted)
            if aborted is not None and aborted.done():
                raise Aborted
        except BaseException:
            self._unpin(entries)
            raise
        return entries

    async def _fetch(
        self,
        missing: Sequence[MediaItem],
        entries: list[Entry],
        aborted: asyncio.Future[None] | None,
    ) -> None:
        """Bring what is missing, and add it, pinned, to ``entries``."""
        with ExitStack() as stack:
            works = self.fetcher.begin(missing)
            for work in works:
                stack.enter_context(work.joined())
            open_works: set[asyncio.Future[Any]] = {work.over for work in works}
            while open_works:
                waits = open_works if aborted is None else {*open_works, aborted}
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if aborted is not None and aborted.done():
                    raise Aborted
                for over in done:
                    if over.cancelled():
                        raise MediaGone(f"worker {self._worker_id} is going down")
                    over.result()
                open_works -= done
            for item in missing:
                entry = self._store.pin(item.digest)
                assert entry is not None, "it stays while somebody has joined"
                entries.append(entry)

    def _unpin(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._store.unpin(entry)

    # --- news ----------------------------------------------------------------------------------

    def on_message(self, peer: Peer, message: Message) -> bool:
        """Take a message between workers about items; False when it is none."""
        if isinstance(message, MediaAsk):
            self.grants.ask(peer, message)
        elif isinstance(message, MediaFetched):
            self.grants.fetched(peer, message)
        elif isinstance(message, MediaGrant | MediaRefused | MediaReleased):
            self.fetcher.on_message(peer, message)
        else:
            return False
        return True

    def peer_lost(self, peer: Peer, error: PeerLost) -> None:
        """Give up what depended on a lost connection."""
        self.grants.peer_lost(peer)
        self.fetcher.peer_lost(peer, error)

    def abort_all(self) -> None:
        """Let nobody read any more: the worker is going down. Streams are aborted by their owners."""
        self.grants.close()

    async def close(self) -> None:
        """End every wait, fetch and read."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.grants.close()
        await self.fetcher.close()

"""Makes items of references: loads, checks, runs the vision tower, keeps the result. Knows no message.

The tower runs in one thread of its own that gives way to everything else on the host, as text streams of
this worker are computed beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import Any, Protocol, runtime_checkable

import structlog

from trtllm_workers.engines.base import ImageEncoder, ImagePlan
from trtllm_workers.errors import EngineError, MediaRejected, NotSupported
from trtllm_workers.transfer.media_store import Claim, Entry, MediaStore
from trtllm_workers.types import MediaItem, MediaKind, MediaReference, VisionInfo
from trtllm_workers.worker.media_meters import CACHED, ENCODED, TAKEN, MediaMeters
from trtllm_workers.worker.shared_work import SharedWork

log = structlog.get_logger(__name__)

DIGEST_BYTES = 16
NICENESS = 10
# References that are loaded, or wait loaded for the tower: their bytes are in memory. More than the loader
# lets in from one kind of place, so that slow hosts do not keep out what is here.
MAX_LOADING = 64
# Images that are decoded: one in the tower, one ready for it.
MAX_DECODED = 2
_CLOSE_TIMEOUT_S = 30.0
_LENGTH = Struct("<q")


class LoadedImage(Protocol):
    """A checked image, not decoded. ``content`` is a digest of its file."""

    @property
    def content(self) -> bytes: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def data(self) -> bytes: ...


class LoadedRows(Protocol):
    """Checked embeddings of one image, in ``room``. ``content`` is a digest of rows, shape and grid."""

    @property
    def content(self) -> bytes: ...
    @property
    def room(self) -> Claim: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int, int] | None: ...


@runtime_checkable
class LoadedEmbeddings(Protocol):
    """What a file of embeddings held. ``made_by``: the fingerprint, in hex, that it names, or ""."""

    @property
    def images(self) -> Sequence[LoadedRows]: ...
    @property
    def made_by(self) -> str: ...


class Loader(Protocol):
    """From a reference to checked bytes; ``media/loader.py`` holds the guarantees.

    ``load`` raises MediaRejected and the like; ``claim`` and ``drop`` are called on the event loop, and what
    was claimed is dropped unless it is returned. ``pixels`` of an image that it returned are RGB bytes
    [height, width, 3].
    """

    async def load(
        self,
        reference: MediaReference,
        claim: Callable[[int], Claim],
        drop: Callable[[Claim], None],
    ) -> LoadedImage | LoadedEmbeddings: ...
    async def pixels(self, image: Any) -> memoryview: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Made:
    """An item, pinned once for whoever asked; ``cached``: it was here already."""

    entry: Entry
    cached: bool


def media_digest(
    source: str,
    maker: bytes,
    content: bytes,
    grid: tuple[int, int, int] | None,
    size: tuple[int, int] = (0, 0),
) -> bytes:
    """Return what tells an item from all others: over its content and what made it."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for part in (source.encode(), maker, content, repr((grid, size)).encode()):
        digest.update(_LENGTH.pack(len(part)))
        digest.update(part)
    return digest.digest()


class ItemMaker:
    """Makes items in one engine's store. ``encoder`` None: images are refused, embeddings may be taken.

    An image that several ask for at once goes through the tower once. Cancelling ``make`` leaves nothing
    behind, except that an image that is in the tower comes out of it.
    """

    def __init__(
        self,
        loader: Loader,
        store: MediaStore,
        encoder: ImageEncoder | None,
        vision: VisionInfo,
        meters: MediaMeters,
    ) -> None:
        self._loader = loader
        self._store = store
        self._encoder = encoder
        self._vision = vision
        self._meters = meters
        self._loading = asyncio.Semaphore(MAX_LOADING)
        self._decoded = asyncio.Semaphore(MAX_DECODED)
        self._tower = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "vision-tower", initializer=_give_way)
        self._images: dict[bytes, SharedWork[Entry]] = {}
        self._tasks: set[asyncio.Task[Entry]] = set()

    async def make(self, reference: MediaReference) -> list[Made]:
        """Return the items of one reference, each pinned for the caller.

        Raises MediaRejected, NotSupported, Overloaded, EngineError.
        """
        async with self._loading:
            loaded = await self._loader.load(reference, self._store.claim, self._store.drop)
            try:
                if isinstance(loaded, LoadedEmbeddings):
                    return self._take(loaded)
                return [await self._encoded(loaded)]
            except MediaRejected as error:
                if error.param is not None:
                    raise
                message = f"{reference.param}: {error}"
                raise MediaRejected(message, param=reference.param) from None
            except NotSupported as error:
                message = f"{reference.param}: {error}"
                raise NotSupported(message, param=reference.param) from None

    # --- embeddings ----------------------------------------------------------------------------

    def _take(self, loaded: LoadedEmbeddings) -> list[Made]:
        made: list[Made] = []
        try:
            self._check_maker(loaded.made_by)
            for rows in loaded.images:
                made.append(self._keep(rows))
        except BaseException:
            for one in made:
                self._store.unpin(one.entry)
            for rows in loaded.images:
                self._store.drop(rows.room)  # of one that is kept this does nothing
            raise
        return made

    def _check_maker(self, made_by: str) -> None:
        if not self._vision.embeddings:
            raise NotSupported(
                "this model's worker takes images, but no files of precomputed embeddings"
            )
        if made_by and self._encoder is not None and made_by != self._encoder.fingerprint.hex():
            raise MediaRejected(
                "these embeddings were made by another model, or by other weights of its vision tower, than "
                "the one that is served; make them again with `trtllm-launch embed`"
            )

    def _keep(self, rows: LoadedRows) -> Made:
        room = rows.room
        if rows.num_tokens * self._store.row_bytes != room.num_bytes:
            raise EngineError(
                f"{rows.num_tokens} rows of embeddings came as {room.num_bytes} bytes; one row of this model "
                f"has {self._store.row_bytes}"
            )
        grid: tuple[int, int, int] | None = None
        if self._encoder is not None:
            grid = self._encoder.check_grid(rows.num_tokens, rows.grid)
        elif self._vision.uses_grid:
            raise NotSupported(
                "this worker has not loaded what tells where the embeddings of this model belong in space"
            )
        digest = media_digest("file", b"", rows.content, grid)
        known = self._store.pin(digest)
        if known is not None:
            self._store.drop(room)
            self._meters.made(CACHED)
            return Made(known, cached=True)
        item = MediaItem(digest, 0, rows.num_tokens, grid=grid, num_bytes=room.num_bytes)
        entry = self._store.commit(room, item)
        self._meters.made(TAKEN)
        return Made(entry, cached=False)

    # --- images --------------------------------------------------------------------------------

    async def _encoded(self, image: LoadedImage) -> Made:
        encoder = self._encoder
        if encoder is None or not self._vision.images:
            raise NotSupported(
                "this model's worker takes files of precomputed embeddings, but no images"
            )
        plan = encoder.plan(image.height, image.width)
        size = (image.height, image.width)
        digest = media_digest(
            f"image {plan.kind}", encoder.fingerprint, image.content, plan.grid, size
        )
        known = self._store.pin(digest)
        if known is not None:
            self._meters.made(CACHED)
            return Made(known, cached=True)
        work = self._images.get(digest)
        if work is None:
            item = MediaItem(
                digest,
                0,
                plan.num_tokens,
                grid=plan.grid,
                kind=plan.kind,
                num_bytes=plan.num_bytes,
                size=size if plan.kind is MediaKind.IMAGE else (0, 0),
            )
            work = self._images[digest] = SharedWork(
                self._store.unpin, lambda: self._forget(digest, work)
            )
            work.start(self._encode(encoder, image, plan, item, work), "encode image")
            assert work.task is not None, "it was started"
            self._tasks.add(work.task)
            work.task.add_done_callback(self._tasks.discard)
        with work.joined():
            await asyncio.wait((work.over,))
            if work.over.cancelled():
                raise EngineError("this worker is going down")
            work.over.result()
            entry = self._store.pin(digest)
            assert entry is not None, "it stays while somebody has joined"
            self._meters.made(ENCODED)
            return Made(entry, cached=False)

    def _forget(self, digest: bytes, work: SharedWork[Entry] | None) -> None:
        if self._images.get(digest) is work:
            self._images.pop(digest, None)

    async def _encode(
        self,
        encoder: ImageEncoder,
        image: LoadedImage,
        plan: ImagePlan,
        item: MediaItem,
        work: SharedWork[Entry],
    ) -> Entry:
        """Return the entry of one image, pinned once."""
        async with self._decoded:
            claim = self._store.claim(plan.num_bytes)
            try:
                pixels = await self._loader.pixels(image)
                async with self._tower:
                    work.fixed = True  # nothing stops a thread
                    began_s = time.monotonic()
                    await asyncio.get_running_loop().run_in_executor(
                        self._thread, _fill, encoder, plan, pixels, image, claim.runs
                    )
                    self._meters.encode_seconds += time.monotonic() - began_s
                return self._store.commit(claim, item)
            except BaseException:
                self._store.drop(claim)
                raise

    async def close(self) -> None:
        """End; an image in the tower comes out first, as the tower's weights go after this."""
        for work in list(self._images.values()):
            work.fail(EngineError("this worker is going down"))
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
            if left:
                log.error("the vision tower does not come to an end", waited_s=_CLOSE_TIMEOUT_S)
        self._thread.shutdown(wait=False, cancel_futures=True)
        await self._loader.close()


def _give_way() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _fill(
    encoder: ImageEncoder,
    plan: ImagePlan,
    pixels: memoryview,
    image: LoadedImage,
    runs: Sequence[memoryview],
) -> None:
    if plan.kind is MediaKind.EMBEDDINGS:
        encoder.encode(pixels, image.height, image.width, runs)
        return
    if pixels.nbytes != plan.num_bytes:
        raise EngineError(
            f"{pixels.nbytes} bytes of pixels for {plan.num_bytes} of an image as the engine takes it"
        )
    at, flat = 0, pixels.cast("B")
    for run in runs:
        run[:] = flat[at : at + run.nbytes]
        at += run.nbytes

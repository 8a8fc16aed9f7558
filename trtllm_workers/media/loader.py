"""From what a request names to checked bytes: the media package's face to a worker.

Nothing here runs long on the event loop: files are read, hashed and looked through in threads, and what
needs a decoder is opened in children of their own (``sandbox``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected, Overloaded, Unavailable
from trtllm_workers.media.descriptors import Descriptor, in_memory
from trtllm_workers.media.digest import digest
from trtllm_workers.media.embeddings import (
    Grid,
    Image,
    Rows,
    content,
    fill,
    num_chunks,
    read_rows,
)
from trtllm_workers.media.files import open_file, read_whole
from trtllm_workers.media.images import Images
from trtllm_workers.media.jobs import Looked
from trtllm_workers.media.pickled import Pickles
from trtllm_workers.media.references import (
    SAFETENSORS,
    Place,
    Reference,
    decoded,
    read_reference,
)
from trtllm_workers.media.safetensors_file import BadFile
from trtllm_workers.media.urls import Fetcher
from trtllm_workers.media.work import Work
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.types import MediaReference, VisionInfo

log = get_logger(__name__)

_THREADS = 4
# What is loaded at once from each place; the rest waits its turn. It bounds memory, and keeps slow hosts
# from holding up what is here already.
_MOST_LOADS = {Place.URL: 32, Place.FILE: 8, Place.DATA: 8}


class Room(Protocol):
    """Claimed memory: ``runs`` are its bytes, in order."""

    @property
    def runs(self) -> Sequence[memoryview]: ...


R = TypeVar("R", bound=Room)


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image that a decoder knows: ``height`` and ``width`` as it will be decoded.

    ``content``: 16 bytes over the encoded ``data``. ``orientation`` is EXIF's; ``param`` is the request's.
    """

    content: bytes
    height: int
    width: int
    data: bytes = field(repr=False)
    orientation: int = 1
    param: str = ""


@dataclass(frozen=True, slots=True)
class LoadedRows(Generic[R]):
    """One image's embeddings, in ``room``: finite rows of the model's width and dtype.

    ``content``: 16 bytes over rows, dtype, shape and grid. ``grid`` is as the file has it (in patches
    before merging, where the model merges them).
    """

    content: bytes
    room: R
    num_tokens: int
    grid: Grid | None


@dataclass(frozen=True, slots=True)
class LoadedEmbeddings(Generic[R]):
    """A file of embeddings. ``made_by``: the fingerprint (hex) of what made it; "" if it does not say."""

    images: list[LoadedRows[R]]
    made_by: str


class MediaLoader:
    """Loads what references name, within ``settings``, for a model. Belongs to one event loop."""

    def __init__(
        self, settings: MediaSettings, vision: VisionInfo, *, fetcher: Fetcher | None = None
    ) -> None:
        self._settings = settings
        self._vision = vision
        self._fetcher = fetcher or Fetcher(settings)
        self._images = Images(settings)
        self._pickles = Pickles(settings)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="media")
        self._num_fillers = max(1, min(_THREADS, os.cpu_count() or 1))
        self._turns = {place: asyncio.Semaphore(most) for place, most in _MOST_LOADS.items()}
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """The children that run now."""
        return [*self._images.pids, *self._pickles.pids]

    async def load(
        self, reference: MediaReference, claim: Callable[[int], R], drop: Callable[[R], None]
    ) -> LoadedImage | LoadedEmbeddings[R]:
        """Return what ``reference`` names; for embeddings, in memory that ``claim`` gave.

        Raises MediaRejected for what is wrong with it, Overloaded when too much is being opened, and
        what ``claim`` raises. Whatever it raises, all claimed rooms are dropped, if need be later, when
        the last thread has let go of them.
        """
        named = read_reference(reference)
        self._check_kind(named)
        if self._closed:
            raise Unavailable("this worker ends")
        turns = self._turns[named.place]
        await self._wait_for(turns)
        try:
            if not named.suffix:
                return await self._image(named)
            return await self._embeddings(named, claim, drop)
        finally:
            turns.release()

    async def pixels(self, image: LoadedImage) -> memoryview:
        """Return an image's RGB bytes [height, width, 3]. Raises MediaRejected for what is broken."""
        look = Looked(image.height, image.width, image.orientation)
        return await self._images.decode(image.data, look, image.param)

    async def close(self) -> None:
        """End all children and threads; what still loads fails. Safe twice."""
        self._closed = True
        await self._images.close()
        await self._pickles.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _wait_for(self, turns: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await turns.acquire()
        except TimeoutError as error:
            raise Overloaded(
                "too many images and files are being loaded by this worker; try again later"
            ) from error

    # --- what the model takes ---------------------------------------------------------------------

    def _check_kind(self, named: Reference) -> None:
        param = named.param
        if not named.suffix and not self._vision.images:
            raise MediaRejected(
                f"{param}: images are not taken here, only files of embeddings", param=param
            )
        if named.suffix and not self._vision.embeddings:
            raise MediaRejected(
                f"{param}: files of embeddings are not taken here, only images", param=param
            )
        if named.suffix and named.suffix != SAFETENSORS and not self._settings.allow_pickle:
            raise MediaRejected(
                f"{param}: {named.suffix} files are not opened here unless the operator allows pickled "
                "embeddings; send a .safetensors file",
                param=param,
            )

    # --- images -----------------------------------------------------------------------------------

    async def _image(self, named: Reference) -> LoadedImage:
        limit = self._settings.max_file_bytes
        if named.place is Place.URL:
            pieces: list[bytes] = []
            await self._fetcher.fetch(named.where, named.param, pieces.append)
            call = partial(_joined, pieces)
        elif named.place is Place.DATA:
            call = partial(_decoded, named, limit)
        else:
            call = partial(_read, named, self._settings)
        async with self._working(named.param, lambda: None) as work:
            [(data, found)] = await work.run([call])
        if not data:
            raise MediaRejected(f"{named.param}: it is empty", param=named.param)
        look = await self._images.look(data, named.param)
        return LoadedImage(found, look.height, look.width, data, look.orientation, named.param)

    # --- embeddings -------------------------------------------------------------------------------

    async def _embeddings(
        self, named: Reference, claim: Callable[[int], R], drop: Callable[[R], None]
    ) -> LoadedEmbeddings[R]:
        files: list[Descriptor] = []
        rooms: list[R] = []

        def undo() -> None:
            for file in files:
                file.close()
            for room in rooms:
                drop(room)

        source, num_bytes = await self._source(named, files, undo)
        try:
            if named.suffix != SAFETENSORS:
                source, num_bytes = await self._pickles.open(source, named.param)
                files.append(source)
        except BaseException:
            undo()
            raise
        async with self._working(named.param, undo) as work:
            read = partial(read_rows, source, num_bytes, self._vision, self._settings.max_items)
            [rows] = await work.run([read])
            images: list[LoadedRows[R]] = []
            for image in rows.images:
                rooms.append(claim(rows.num_bytes(image)))
            for image, room in zip(rows.images, rooms, strict=True):
                found = await self._fill(work, source, rows, image, room.runs)
                images.append(LoadedRows(found, room, image.num_tokens, image.grid))
            if source.num_bytes < num_bytes:
                raise BadFile("it changed while it was read")
        for file in files:
            file.close()
        return LoadedEmbeddings(images, rows.made_by)

    async def _source(
        self, named: Reference, files: list[Descriptor], undo: Callable[[], None]
    ) -> tuple[Descriptor, int]:
        """Open a file of embeddings, or fetch it into memory; in ``files`` as soon as it is open."""
        if named.place is Place.URL:
            file = in_memory()
            files.append(file)
            try:
                return file, await self._fetcher.fetch(named.where, named.param, file.write)
            except BaseException:
                undo()
                raise

        def open_it() -> Descriptor:
            settings = self._settings
            file = open_file(
                named.where, settings.allowed_local_path, named.param, settings.max_file_bytes
            )
            files.append(file)
            return file

        async with self._working(named.param, undo) as work:
            [file] = await work.run([open_it])
            return file, file.num_bytes

    async def _fill(
        self, work: Work, source: Descriptor, rows: Rows, image: Image, runs: Sequence[memoryview]
    ) -> bytes:
        count = num_chunks(rows.num_bytes(image))
        step = min(self._num_fillers, count)
        calls = [
            partial(fill, source, rows, image, runs, first, step, work.check)
            for first in range(step)
        ]
        parts = await work.run(calls)
        chunks = [parts[index % step][index // step] for index in range(count)]
        return content(rows, image, chunks)

    @asynccontextmanager
    async def _working(self, param: str, undo: Callable[[], None]) -> AsyncIterator[Work]:
        """Give what runs calls in threads, within the time for one load; map its errors."""
        work = Work(self._threads)
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                yield work
        except BadFile as error:
            work.fail(undo)
            log.info("a file of embeddings was refused", param=param, reason=str(error))
            raise MediaRejected(f"{param}: this file is not taken: {error}", param=param) from error
        except TimeoutError as error:
            work.fail(undo)
            log.warning("a file was not read in time", param=param)
            raise MediaRejected(
                f"{param}: this was not read within {self._settings.timeout_s:g} s", param=param
            ) from error
        except OSError as error:
            work.fail(undo)
            log.warning("a file could not be read", param=param, error=str(error))
            raise MediaRejected(
                f"{param}: this names no file that may be read here", param=param
            ) from error
        except BaseException:
            work.fail(undo)
            raise


def _joined(pieces: list[bytes]) -> tuple[bytes, bytes]:
    data = b"".join(pieces)
    return data, digest(data)


def _decoded(named: Reference, limit: int) -> tuple[bytes, bytes]:
    data = decoded(named.where, named.param, limit)
    return data, digest(data)


def _read(named: Reference, settings: MediaSettings) -> tuple[bytes, bytes]:
    limit = settings.max_file_bytes
    with open_file(named.where, settings.allowed_local_path, named.param, limit) as file:
        data = read_whole(file.fd, file.num_bytes, named.param)
    return data, digest(data)

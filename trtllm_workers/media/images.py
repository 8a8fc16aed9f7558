"""Images: their size by the header, and their pixels, both from a sandboxed child."""

from __future__ import annotations

import asyncio
import mmap

from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.descriptors import Descriptor, in_memory, room_in_memory
from trtllm_workers.media.jobs import Decode, Decoded, Kind, Look, Looked, Refused, Why
from trtllm_workers.media.sandbox import ChildFailed, Sandbox, TimedOut
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)

MIB = 1 << 20

_MOST_CHILDREN = 2
_MEMORY = 192 * MIB
# Four bytes for each pixel, three times: decoded, as RGB, turned. And a decoder's own.
_PIXEL_BYTES = 24
_FORMATS = "PNG, JPEG, WebP, GIF or BMP"


class Images:
    """Opens images. Belongs to one event loop; ``close`` ends its children."""

    def __init__(self, settings: MediaSettings) -> None:
        self._settings = settings
        self._sandbox = Sandbox(
            Kind.IMAGES,
            max_children=_MOST_CHILDREN,
            memory_bytes=_MEMORY + _PIXEL_BYTES * settings.max_pixels + 4 * settings.max_file_bytes,
            wait_timeout_s=settings.timeout_s,
        )

    @property
    def pids(self) -> list[int]:
        """The children that run."""
        return self._sandbox.pids

    async def look(self, encoded: bytes, param: str) -> Looked:
        """Return an image's size. Raises MediaRejected for what is none, and for too many pixels."""
        settings = self._settings
        job = Look(settings.max_pixels, settings.timeout_s)
        with in_memory() as source:
            await _write(source, encoded)
            try:
                found = await self._sandbox.run(job, [source.fd], Looked, settings.timeout_s)
            except ChildFailed as error:
                raise _failed(error, param) from error
        if isinstance(found, Refused):
            raise self._refused(found, param)
        if not (
            found.height > 0
            and found.width > 0
            and found.height * found.width <= settings.max_pixels
            and 1 <= found.orientation <= 8
        ):
            raise _broken(param)
        return found

    async def decode(self, encoded: bytes, look: Looked, param: str) -> memoryview:
        """Return RGB bytes [height, width, 3]. Raises MediaRejected for what is broken."""
        settings = self._settings
        job = Decode(
            look.height, look.width, look.orientation, settings.max_pixels, settings.timeout_s
        )
        num_bytes = 3 * look.height * look.width
        with in_memory() as source, room_in_memory(num_bytes) as target:
            await _write(source, encoded)
            fds = [source.fd, target.fd]
            try:
                found = await self._sandbox.run(job, fds, Decoded, settings.timeout_s)
            except ChildFailed as error:
                raise _failed(error, param) from error
            if isinstance(found, Refused):
                raise self._refused(found, param)
            return memoryview(mmap.mmap(target.fd, num_bytes, prot=mmap.PROT_READ))

    async def close(self) -> None:
        await self._sandbox.close()

    def _refused(self, refused: Refused, param: str) -> MediaRejected:
        log.info("an image was refused", param=param, why=refused.why, details=refused.details)
        height, width = refused.size
        match refused.why:
            case Why.FORMAT:
                text = f"this is not an image of a format that is taken ({_FORMATS})"
            case Why.ANIMATED:
                text = "animated images are not taken; send one picture of it"
            case Why.PIXELS if height > 0 and width > 0:
                text = (
                    f"this image has {width} × {height} pixels; at most {self._settings.max_pixels} "
                    "in all are taken"
                )
            case Why.PIXELS:
                text = f"this image has more than the {self._settings.max_pixels} pixels that are taken"
            case Why.MEMORY:
                text = "this image takes more memory to decode than images may"
            case _:
                return _broken(param)
        return MediaRejected(f"{param}: {text}", param=param)


async def _write(target: Descriptor, encoded: bytes) -> None:
    # In pieces that take less than a millisecond: others of the event loop have their turn in between.
    whole = memoryview(encoded)
    for at in range(0, len(whole), MIB):
        target.write(whole[at : at + MIB])
        await asyncio.sleep(0)


def _broken(param: str) -> MediaRejected:
    return MediaRejected(f"{param}: this image is damaged or incomplete", param=param)


def _failed(error: ChildFailed, param: str) -> MediaRejected:
    log.warning("a child failed on an image", param=param, error=str(error))
    if isinstance(error, TimedOut):
        return MediaRejected(f"{param}: this image takes too long to decode", param=param)
    return _broken(param)

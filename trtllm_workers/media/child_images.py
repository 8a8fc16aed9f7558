"""Images in a sandboxed child: what they are by their header, and their pixels. Imports Pillow."""

from __future__ import annotations

import io
import mmap
import os
import warnings

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from trtllm_workers.media.jobs import Decode, Decoded, Job, Look, Looked, Refused, Reply, Why

# What is decoded; other decoders of Pillow are never tried.
_PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# A JPEG of several pictures (phones make them) begins with the one that all programs show.
_SHOWS_FIRST = ("MPO",)

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Rows are written in strips of about so many bytes, so that no second copy of all of them is made.
_STRIP = 1 << 20

warnings.simplefilter("error", Image.DecompressionBombWarning)


class _No(Exception):
    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.why)
        self.refused = refused


def handle(job: Job, fds: list[int]) -> Reply:
    """Do a job on an image."""
    try:
        match job, fds:
            case Look(), [source]:
                with _opened(source, job.max_pixels) as image:
                    orientation = _orientation(image)
                    width, height = image.size
                    if orientation in _SIDEWAYS:
                        width, height = height, width
                    return Looked(height, width, orientation)
            case Decode(), [source, target]:
                with _opened(source, job.max_pixels) as image:
                    _write(_decoded(image, job.orientation), job, target)
                return Decoded()
    except _No as error:
        return error.refused
    raise ValueError("not a job for images")


def _opened(source: int, max_pixels: int) -> Image.Image:
    """Read an image's header; nothing is decoded yet."""
    size = os.fstat(source).st_size
    content = os.pread(source, size, 0)
    _check_size(_webp_size(content), max_pixels)
    Image.MAX_IMAGE_PIXELS = None  # ours is next, and says how large it is
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise _No(Refused(Why.FORMAT)) from error
    _check_size(image.size, max_pixels)
    if getattr(image, "is_animated", False) and image.format not in _SHOWS_FIRST:
        raise _No(Refused(Why.ANIMATED))
    Image.MAX_IMAGE_PIXELS = max_pixels  # for what the header does not show
    return image


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _No(Refused(Why.PIXELS, size=(height, width)))


def _webp_size(content: bytes) -> tuple[int, int]:
    """Return a WebP's (width, height), (0, 0) if it is none: its decoder takes memory when it is opened."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return 0, 0
    match content[12:16]:
        case b"VP8X":
            return (
                int.from_bytes(content[24:27], "little") + 1,
                int.from_bytes(content[27:30], "little") + 1,
            )
        case b"VP8L":
            bits = int.from_bytes(content[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return (
                int.from_bytes(content[26:28], "little") & 0x3FFF,
                int.from_bytes(content[28:30], "little") & 0x3FFF,
            )
    return 0, 0


def _orientation(image: Image.Image) -> int:
    # Of a PNG only what stands before its pixels: the rest is not known without decoding it.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in _TURNS else 1


def _decoded(image: Image.Image, orientation: int) -> Image.Image:
    image.load()
    if image.mode in _SIXTEEN_BITS:
        # Pillow would cut values off at 255.
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _write(image: Image.Image, job: Decode, target: int) -> None:
    if image.size != (job.width, job.height):
        raise ValueError("decoded to another size")
    row_bytes = 3 * job.width
    rows = max(1, _STRIP // row_bytes)
    with mmap.mmap(target, job.height * row_bytes) as pixels:
        for top in range(0, job.height, rows):
            bottom = min(top + rows, job.height)
            strip = image.crop((0, top, job.width, bottom))
            pixels[top * row_bytes : bottom * row_bytes] = strip.tobytes()

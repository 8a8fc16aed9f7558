from __future__ import annotations

import asyncio
import base64
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.unit.media.support import (
    PARAM,
    Rooms,
    answering,
    encoded,
    load_image,
    loader,
    png,
    response,
    serving,
    written,
)
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.errors import MediaRejected
from trtllm_workers.media.loader import LoadedImage, MediaLoader
from trtllm_workers.types import MediaReference


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[MediaLoader]:
    settings = MediaSettings(allowed_local_path=tmp_path, max_pixels=20_000, max_file_bytes=1 << 20)
    async with loader(settings) as one:
        yield one


def picture(mode: str = "RGB", width: int = 13, height: int = 7) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values).convert("RGB" if mode in ("CMYK", "P") else mode).convert(mode)


async def pixels(made: MediaLoader, tmp_path: Path, content: bytes) -> tuple[LoadedImage, bytes]:
    image = await load_image(made, written(tmp_path / "x.png", content))
    found = await made.pixels(image)
    assert len(found) == image.height * image.width * 3
    return image, bytes(found)


async def refused(made: MediaLoader, tmp_path: Path, content: bytes) -> str:
    path = written(tmp_path / "x.png", content)
    with pytest.raises(MediaRejected) as caught:
        await made.pixels(await load_image(made, path))
    assert caught.value.param == PARAM
    assert "/" not in str(caught.value)
    assert "Errno" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        *(("GIF", mode) for mode in ("P", "L")),
        *(("BMP", mode) for mode in ("RGB", "L", "P", "1")),
    ],
)
async def test_formats_and_modes_become_rgb(
    made: MediaLoader, tmp_path: Path, kind: str, mode: str
) -> None:
    content = encoded(picture(mode), kind)
    written(tmp_path / "y", content)
    with Image.open(tmp_path / "y") as opened:
        expected = opened.convert("RGB").tobytes()
    image, found = await pixels(made, tmp_path, content)
    assert (image.height, image.width) == (7, 13)
    assert found == expected


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
async def test_exif_orientation(
    made: MediaLoader, tmp_path: Path, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(), kind, exif=exif)
    written(tmp_path / "y", content)
    with Image.open(tmp_path / "y") as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    image, found = await pixels(made, tmp_path, content)
    assert (image.width, image.height) == expected.size
    assert found == expected.tobytes()


async def test_sixteen_bits_are_scaled_not_cut_off(made: MediaLoader, tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 0x80FF, 65535]], dtype=np.uint16)
    _, found = await pixels(made, tmp_path, encoded(Image.fromarray(values), "PNG"))
    assert list(found[::3]) == [0, 0, 1, 0x80, 255]


async def test_content_is_that_of_the_encoded_bytes(made: MediaLoader, tmp_path: Path) -> None:
    first, same, other = [
        (await pixels(made, tmp_path, png(3, 2, colour)))[0].content
        for colour in ((1, 2, 3), (1, 2, 3), (1, 2, 4))
    ]
    assert first == same != other
    assert len(first) == 16


async def test_images_of_data_urls_and_urls() -> None:
    content = png(6, 5)
    settings = MediaSettings(url_hosts=("127.0.0.1",))
    async with serving(answering(response(content))) as server, loader(settings) as made:
        by_url = await load_image(made, server.url("/any?x=.pt"))
        by_data = await load_image(
            made, "data:image/png;base64," + base64.b64encode(content).decode()
        )
    assert by_url == by_data
    assert (by_data.height, by_data.width) == (5, 6)


# --- what is refused -----------------------------------------------------------------------------


def bomb(width: int, height: int, rows: int = 100) -> bytes:
    """Return a PNG that says it is large, and of which some rows are there."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(min((3 * width + 1) * rows, 1 << 24)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


async def test_bombs_are_refused_by_their_header(made: MediaLoader, tmp_path: Path) -> None:
    text = await refused(made, tmp_path, bomb(50_000, 50_000))
    assert "50000 × 50000 pixels" in text
    assert "20000 in all" in text
    for width, height in ((141, 142), (20_001, 1), (1, 20_001), (2**31 - 1, 2**31 - 1)):
        assert "pixels" in await refused(made, tmp_path, bomb(width, height))
    assert len(made.pids) == 1  # nothing took the child with it


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "PNG"])
async def test_giant_images_of_every_format(made: MediaLoader, tmp_path: Path, kind: str) -> None:
    giant = Image.new("L" if kind == "GIF" else "RGB", (401, 100))
    assert "pixels" in await refused(made, tmp_path, encoded(giant, kind))
    fits = Image.new("L" if kind == "GIF" else "RGB", (200, 100))
    assert (await pixels(made, tmp_path, encoded(fits, kind)))[0].width == 200


async def test_a_webp_whose_canvas_is_a_lie(made: MediaLoader, tmp_path: Path) -> None:
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\xff\x3f\0" + b"\xff\x3f\0"
    content = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    assert "16384 × 16384 pixels" in await refused(made, tmp_path, content)


async def test_giant_texts_in_a_png_do_not_unpack(made: MediaLoader, tmp_path: Path) -> None:
    text = b"zTXt" + b"key\0\0" + zlib.compress(bytes(50_000_000), 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    content = png()
    await refused(made, tmp_path, content[:33] + chunk + content[33:])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
async def test_incomplete_and_damaged_images(made: MediaLoader, tmp_path: Path, kind: str) -> None:
    content = encoded(picture("L" if kind == "GIF" else "RGB", 90, 90), kind)
    for end in (len(content) // 2, len(content) // 4, 30):
        await refused(made, tmp_path, content[:end])
    assert (await pixels(made, tmp_path, content))[0].height == 90


async def test_animations_are_refused(made: MediaLoader, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert "animated" in await refused(made, tmp_path, content)


async def test_the_first_picture_of_a_phones_jpeg(made: MediaLoader, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    _, found = await pixels(made, tmp_path, content)
    assert found[0] > 200 > 100 > found[2]


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA", "PCX", "SGI", "DDS", "EPS", "PDF"])
async def test_other_formats_are_refused(made: MediaLoader, tmp_path: Path, kind: str) -> None:
    assert "format" in await refused(made, tmp_path, encoded(picture(width=16, height=16), kind))


async def test_what_is_no_image(made: MediaLoader, tmp_path: Path) -> None:
    for content in (
        b"x",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"#!/bin/sh\n",
        bytes(1000),
    ):
        assert "format" in await refused(made, tmp_path, content)
    assert "empty" in await refused(made, tmp_path, b"")


async def test_an_image_that_changed_between_look_and_decode(
    made: MediaLoader, tmp_path: Path
) -> None:
    image = await load_image(made, written(tmp_path / "x.png", png(4, 4)))
    lie = LoadedImage(image.content, 2, 2, image.data, param=PARAM)
    with pytest.raises(MediaRejected, match="damaged"):
        await made.pixels(lie)
    assert len(await made.pixels(image)) == 48


async def test_many_at_once_have_two_children(made: MediaLoader, tmp_path: Path) -> None:
    paths = [
        written(tmp_path / f"{index}.png", png(10, index + 1, (index, 0, 0))) for index in range(20)
    ]

    async def one(path: str) -> bytes:
        return bytes(await made.pixels(await load_image(made, path)))

    found = await asyncio.gather(*map(one, paths))
    assert found == [bytes([index, 0, 0]) * 10 * (index + 1) for index in range(20)]
    assert len(made.pids) == 2


async def test_a_fetch_that_is_cancelled_leaves_nothing() -> None:
    asked = asyncio.Event()

    async def silent(_head: bytes, _writer: asyncio.StreamWriter) -> None:
        asked.set()
        await asyncio.Event().wait()

    settings = MediaSettings(url_hosts=("127.0.0.1",))
    for path in ("/x.png", "/x.safetensors"):
        asked.clear()
        async with loader(settings) as made, serving(silent) as server:
            rooms = Rooms()
            task = asyncio.create_task(
                made.load(MediaReference(server.url(path), PARAM), rooms.claim, rooms.drop)
            )
            await asyncio.wait_for(asked.wait(), 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert rooms.open == []

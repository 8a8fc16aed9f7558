"""What the tests of media share: a model, rooms that are counted, files, and a server that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from trtllm_workers.config.media import MediaSettings
from trtllm_workers.media.loader import LoadedEmbeddings, LoadedImage, MediaLoader
from trtllm_workers.media.urls import Fetcher
from trtllm_workers.types import MediaReference, VisionInfo

PARAM = "messages.0.content.1.image_url.url"
HIDDEN = 8


def vision(**changes: Any) -> VisionInfo:
    given: dict[str, Any] = {
        "family": "llava",
        "image_token_id": 7,
        "placeholder": "<image>",
        "hidden_size": HIDDEN,
        "dtype": "float32",
    }
    return VisionInfo(**(given | changes))


@dataclass(eq=False)
class Room:
    """Claimed memory, in pieces that fit nothing well."""

    runs: list[memoryview]

    @property
    def content(self) -> bytes:
        return b"".join(self.runs)


@dataclass
class Rooms:
    """A store's ``claim`` and ``drop``; ``open`` are the rooms that nobody dropped."""

    open: list[Room] = field(default_factory=list)
    piece_bytes: int = 40
    dropped: asyncio.Event = field(default_factory=asyncio.Event)

    def claim(self, num_bytes: int) -> Room:
        room = Room(
            [
                memoryview(bytearray(min(self.piece_bytes, num_bytes - at)))
                for at in range(0, num_bytes, self.piece_bytes)
            ]
        )
        self.open.append(room)
        return room

    def drop(self, room: Room) -> None:
        self.open.remove(room)
        self.dropped.set()


@asynccontextmanager
async def loader(
    settings: MediaSettings, model: VisionInfo | None = None, fetcher: Fetcher | None = None
) -> AsyncIterator[MediaLoader]:
    """Give a loader; afterwards none of its descriptors or children is left."""
    before = len(os.listdir("/proc/self/fd"))
    made = MediaLoader(settings, model or vision(), fetcher=fetcher)
    try:
        yield made
    finally:
        pids = made.pids
        await made.close()
        assert made.pids == []
        assert not any(_runs(pid) for pid in pids)
    assert len(os.listdir("/proc/self/fd")) <= before


def _runs(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def load(made: MediaLoader, url: str, rooms: Rooms) -> LoadedImage | LoadedEmbeddings[Room]:
    return await made.load(MediaReference(url, PARAM), rooms.claim, rooms.drop)


async def load_image(made: MediaLoader, url: str) -> LoadedImage:
    found = await load(made, url, Rooms())
    assert isinstance(found, LoadedImage)
    return found


async def load_rows(
    made: MediaLoader, url: str, rooms: Rooms | None = None
) -> LoadedEmbeddings[Room]:
    found = await load(made, url, rooms or Rooms())
    assert isinstance(found, LoadedEmbeddings)
    return found


def png(width: int = 3, height: int = 2, colour: tuple[int, int, int] = (10, 20, 30)) -> bytes:
    return encoded(Image.new("RGB", (width, height), colour), "PNG")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def safetensors(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    """Return a file with whatever header, however wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server on this host. ``requests`` are the heads it was sent."""

    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0

    def url(self, path: str = "/a.png", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    """Run a server that reads a request's head and lets ``answer`` write what it likes."""
    server = Server()
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        server.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            server.requests.append(head)
            await answer(head, writer)
            await writer.drain()
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()
        tasks.discard(task)

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)


def response(
    body: bytes, *headers: str, status: str = "200 OK", length: int | None = None
) -> bytes:
    count = len(body) if length is None else length
    head = "\r\n".join((f"HTTP/1.1 {status}", f"Content-Length: {count}", *headers, "", ""))
    return head.encode() + body


def answering(content: bytes) -> Answer:
    async def answer(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(content)

    return answer


def redirecting(to: str) -> Answer:
    return answering(response(b"", f"Location: {to}", status="302 Found"))

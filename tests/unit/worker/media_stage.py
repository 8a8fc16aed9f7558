"""Images at workers, for tests: a loader and a tower that make up their bytes, and an engine that looks.

References: ``image:NAME:HxW``, ``rows:NAME:TOKENS`` (``rows:NAME:TOKENSxIMAGES``, and ``:MADE_BY`` at the end),
``bad``, ``broken`` and ``slow:...`` (waits for ``Loads.gate``).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import msgspec

from trtllm_workers.engines.base import (
    Deliver,
    DeliverPrefilled,
    Engine,
    ImagePlan,
)
from trtllm_workers.errors import EngineError, MediaRejected, RequestError
from trtllm_workers.planes.media_messages import Encoded, EncodeFailed
from trtllm_workers.planes.messages import Message
from trtllm_workers.transfer.media_store import Entry, MediaStore
from trtllm_workers.types import (
    Address,
    EngineInfo,
    GenerateRequest,
    MediaItem,
    MediaKind,
    MediaReference,
    Prefilled,
    TokenChunk,
    VisionInfo,
)

DEADLINE_S = 20.0
HIDDEN = 32
ROW_BYTES = 2 * HIDDEN
PATCH = 4
MADE_BY = b"tower-one-------"
VISION = VisionInfo(
    family="llava", image_token_id=7, placeholder="<image>", hidden_size=HIDDEN, dtype="bfloat16"
)


def make_store(num_blocks: int = 64, rows_per_block: int = 4) -> MediaStore:
    return MediaStore(
        num_blocks=num_blocks,
        rows_per_block=rows_per_block,
        row_size=HIDDEN,
        dtype="bfloat16",
        value_bytes=2,
    )


def pattern(seed: bytes, num_bytes: int) -> bytes:
    """Return bytes that no other seed gives."""
    word = blake2b(seed, digest_size=32).digest()
    return (word * (num_bytes // len(word) + 1))[:num_bytes]


def fill(runs: Sequence[memoryview], content: bytes) -> None:
    at = 0
    for run in runs:
        run[:] = content[at : at + run.nbytes]
        at += run.nbytes
    assert at == len(content)


def reference(url: str, at: int = 0) -> MediaReference:
    return MediaReference(url, f"messages[0].content[{at}].image_url.url")


@dataclass
class Image:
    content: bytes
    height: int
    width: int
    data: bytes


@dataclass
class Rows:
    content: bytes
    room: Any
    num_tokens: int
    grid: tuple[int, int, int] | None = None


@dataclass
class Embeddings:
    images: list[Rows]
    made_by: str = ""


@dataclass
class Loads:
    """A loader. ``gate`` holds what is slow."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0
    loaded: list[str] = field(default_factory=list)
    closed: bool = False

    async def load(
        self,
        reference: MediaReference,
        claim: Callable[[int], Any],
        drop: Callable[[Any], None],
    ) -> Image | Embeddings:
        kind, *rest = reference.url.split(":")
        if kind == "slow":
            self.waiting += 1
            await self.gate.wait()
            kind, *rest = rest
        self.loaded.append(reference.url)
        if kind == "bad":
            raise MediaRejected("this is no image", param=reference.param)
        if kind == "broken":
            raise OSError(13, "Permission denied", "/secret/place")
        name = rest[0].encode()
        if kind == "image":
            height, width = map(int, rest[1].split("x"))
            return Image(blake2b(name, digest_size=16).digest(), height, width, name)
        tokens, _, images = rest[1].partition("x")
        made = Embeddings([], rest[2] if len(rest) > 2 else "")
        for number in range(int(images or 1)):
            seed = name + bytes([number])
            room = claim(int(tokens) * ROW_BYTES)
            fill(room.runs, pattern(seed, room.num_bytes))
            made.images.append(Rows(blake2b(seed, digest_size=16).digest(), room, int(tokens)))
        return made

    async def pixels(self, image: Any) -> memoryview:
        return memoryview(pattern(image.data, image.height * image.width * 3))

    async def close(self) -> None:
        self.closed = True


@dataclass
class Tower:
    """A vision tower. While ``gate`` is not set images stay in it."""

    fingerprint: bytes = MADE_BY
    kind: MediaKind = MediaKind.EMBEDDINGS
    gate: threading.Event = field(default_factory=threading.Event)
    inside: threading.Event = field(default_factory=threading.Event)
    encoded: list[bytes] = field(default_factory=list)
    niceness: set[int] = field(default_factory=set)
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.gate.set()

    def plan(self, height: int, width: int) -> ImagePlan:
        if height < PATCH or width < PATCH:
            raise MediaRejected(f"an image of {width} x {height} is too small for this model")
        num_tokens = (height // PATCH) * (width // PATCH)
        if self.kind is MediaKind.IMAGE:
            return ImagePlan(num_tokens, height * width * 3, kind=self.kind)
        return ImagePlan(num_tokens, num_tokens * ROW_BYTES)

    def check_grid(
        self, num_tokens: int, grid: tuple[int, int, int] | None
    ) -> tuple[int, int, int] | None:
        if num_tokens == 13:
            raise MediaRejected("no image has 13 tokens")
        return grid

    def encode(
        self, pixels: memoryview, height: int, width: int, into: Sequence[memoryview]
    ) -> None:
        self.inside.set()
        assert self.gate.wait(DEADLINE_S)
        self.niceness.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        self.encoded.append(bytes(pixels))
        if self.error is not None:
            raise self.error
        fill(into, rows_of(bytes(pixels), height, width))


def rows_of(pixels: bytes, height: int, width: int) -> bytes:
    """Return what the tower makes of an image."""
    num_tokens = (height // PATCH) * (width // PATCH)
    return pattern(blake2b(pixels).digest(), num_tokens * ROW_BYTES)


def image_rows(name: str, height: int, width: int) -> bytes:
    return rows_of(pattern(name.encode(), height * width * 3), height, width)


INGRESS = Address("127.0.0.1", 1, "ingress", "1")


@dataclass(eq=False)
class Inbox:
    """Implements Peer: an ingress that keeps what it is told."""

    address: Address = INGRESS
    write_paused: bool = False
    messages: list[Message] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, message: Message) -> None:
        self.messages.append(message)
        self.news.set()

    async def answer(self, ask: int) -> Encoded | EncodeFailed:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for message in self.messages:
                    if isinstance(message, Encoded | EncodeFailed) and message.ask == ask:
                        return message
                self.news.clear()
                await self.news.wait()


async def until(met: Callable[[], object]) -> None:
    """Wait for a count that has no event."""
    async with asyncio.timeout(DEADLINE_S):
        while not met():  # noqa: ASYNC110 - a count
            await asyncio.sleep(0.001)


class Sighted:
    """A sim engine that takes images: it looks at their bytes, and pins them until a request ends.

    ``blind``: without a vision tower. ``mute``: without a language model.
    """

    def __init__(self, engine: Engine, *, blind: bool = False, mute: bool = False) -> None:
        self._engine = engine
        self._mute = mute
        self.media_store: MediaStore | None = make_store()
        self.encoder: Tower | None = None if blind else Tower()
        self.seen: list[tuple[str, list[bytes]]] = []
        self._pins: dict[str, list[Entry]] = {}
        self._reserved: dict[str, GenerateRequest] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> EngineInfo:
        info = await self._engine.start()
        return msgspec.structs.replace(
            info, vision=msgspec.structs.replace(VISION, encodes=self.encoder is not None)
        )

    @property
    def num_pinned(self) -> int:
        """Requests that hold images."""
        return len(self._pins)

    def _look(self, request: GenerateRequest) -> GenerateRequest:
        if not request.media:
            return request
        store = self.media_store
        assert store is not None
        if request.sampling.max_tokens == 99:
            raise RequestError("99 tokens are too many", param="max_tokens")
        entries: list[Entry] = []
        contents: list[bytes] = []
        for item in request.media:
            entry = store.pin(item.digest)
            if entry is None:
                for pinned in entries:
                    store.unpin(pinned)
                raise EngineError("an image is not in the store")
            entries.append(entry)
            contents.append(b"".join(store.bytes_of(entry)))
        self._pins[request.request_id] = entries
        self.seen.append((request.request_id, contents))
        return msgspec.structs.replace(request, media=())

    def _ended(self, request_id: str) -> None:
        store = self.media_store
        assert store is not None
        for entry in self._pins.pop(request_id, []):
            store.unpin(entry)

    def _watched(self, request_id: str, deliver: Deliver) -> Deliver:
        def take(chunk: TokenChunk) -> None:
            if chunk.finish_reason is not None:
                self._ended(request_id)
            deliver(chunk)

        return take

    def _watched_prefill(self, request_id: str, deliver: DeliverPrefilled) -> DeliverPrefilled:
        def take(prefilled: Prefilled) -> None:
            if prefilled.first.finish_reason is not None:
                self._ended(request_id)
            deliver(prefilled)

        return take

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        if self._mute:
            raise RequestError("there is no language model here")
        seen = self._look(request)
        self._engine.submit(seen, self._watched(request.request_id, deliver))

    def prefill(self, request: GenerateRequest, deliver: DeliverPrefilled) -> None:
        seen = self._look(request)
        self._engine.prefill(seen, self._watched_prefill(request.request_id, deliver))

    def reserve(self, request: GenerateRequest, deliver: Any) -> None:
        self._reserved[request.request_id] = request
        self._engine.reserve(msgspec.structs.replace(request, media=()), deliver)

    def prefill_reserved(
        self, request_id: str, num_filled_blocks: int, deliver: DeliverPrefilled
    ) -> None:
        self._look(self._reserved.pop(request_id))
        self._engine.prefill_reserved(
            request_id, num_filled_blocks, self._watched_prefill(request_id, deliver)
        )

    def resume(
        self, request_id: str, first: TokenChunk | None, deliver: Deliver, opaque: bytes = b""
    ) -> None:
        request = self._reserved.pop(request_id, None)
        if first is None and request is not None:
            self._look(request)
            deliver = self._watched(request_id, deliver)
        self._engine.resume(request_id, first, deliver, opaque)

    def release(self, request_id: str) -> None:
        self._ended(request_id)
        self._engine.release(request_id)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)


def request_with(
    items: Sequence[MediaItem], number: int = 0, max_tokens: int = 6, text: int = 20
) -> GenerateRequest:
    """Return a prompt of text, then the placeholders of each item."""
    from tests.unit.worker.cluster import prompt_of, request

    prompt = prompt_of(number, text)
    placed: list[MediaItem] = []
    for item in items:
        placed.append(msgspec.structs.replace(item, offset=len(prompt)))
        prompt += [VISION.image_token_id] * item.num_tokens
    asked = request(prompt, max_tokens=max_tokens)
    return msgspec.structs.replace(asked, media=tuple(placed))


def flat(encoded: Encoded | EncodeFailed) -> list[MediaItem]:
    assert isinstance(encoded, Encoded), encoded
    return list(itertools.chain.from_iterable(encoded.items))

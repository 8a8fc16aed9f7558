"""Messages to bytes and back. Pure: knows no socket, no clock and no peer.

::

    ┌────────────────┬─────────┬──────────────────────────────┐
    │ length, u32 LE │ version │ msgpack array: [tag, fields] │
    └────────────────┴─────────┴──────────────────────────────┘
         4 bytes        1 byte          length - 1 bytes

``length`` counts everything after itself. The version stands in every frame and outside the
msgpack, so that two releases can tell each other apart whatever else changes between them.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Final

import msgspec

from trtllm_workers.errors import FrameError
from trtllm_workers.planes.messages import Message, Tokens
from trtllm_workers.types import TokenChunk

PROTOCOL_VERSION: Final = 2
HEADER_BYTES: Final = 5
MAX_FRAME_BYTES: Final = 32 * 1024 * 1024  # a prompt of a million tokens takes 5 MiB

_HEADER = struct.Struct("<IB")
_U32 = "I"
_U32_BYTES = 4
_LITTLE_ENDIAN = sys.byteorder == "little"
if array(_U32).itemsize != _U32_BYTES:  # pragma: no cover - no CPython platform we know of
    raise ImportError("this platform's unsigned int is not 32 bits wide; the frames need one")

_encode_msgpack = msgspec.msgpack.Encoder().encode
_decode_msgpack = msgspec.msgpack.Decoder(Message).decode

# What msgspec raises on bytes that are no Message: DecodeError by contract, UnicodeDecodeError for
# text that is not UTF-8, RecursionError for arrays nested without end.
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def pack(body: bytes) -> bytes:
    """Put the header before a body. Raises FrameError when it is over MAX_FRAME_BYTES."""
    length = len(body) + 1
    if length > MAX_FRAME_BYTES:
        raise FrameError(
            f"a message of {length} bytes is over the limit of {MAX_FRAME_BYTES} bytes a frame"
        )
    return _HEADER.pack(length, PROTOCOL_VERSION) + body


def encode(message: Message) -> bytes:
    """Return the frame of one message. Raises FrameError when it is over MAX_FRAME_BYTES."""
    return pack(_encode_msgpack(message))


def take_body(buffer: bytearray, max_frame_bytes: int) -> bytes | None:
    """Remove the first whole frame from ``buffer`` and return its body; None when it is not whole.

    Raises FrameError on a length or version that cannot be right.
    """
    if len(buffer) < HEADER_BYTES:
        return None
    length, version = _HEADER.unpack_from(buffer)
    _check_header(length, version, max_frame_bytes)
    end = _U32_BYTES + length
    if len(buffer) < end:
        return None
    body = bytes(buffer[HEADER_BYTES:end])
    del buffer[:end]
    return body


class Decoder:
    """Turns a stream of bytes, cut anywhere, into messages.

    Holds at most one unfinished frame. After a FrameError the stream has no meaning any more and
    every later call raises the same again.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._rest = bytearray()
        self._wanted_bytes = HEADER_BYTES
        self._broken: str | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> list[Message]:
        """Return the messages that are complete now, in order.

        Raises FrameError, which says what was seen: a length over the limit, another protocol
        version, or a body that is no message (unknown tag, wrong field, cut short).
        """
        if self._broken is not None:
            raise FrameError(self._broken)
        rest = self._rest
        if rest:
            rest += data
            if len(rest) < self._wanted_bytes:
                return []
            data = bytes(rest)
            rest.clear()
        try:
            messages, used = self._decode(data)
        except FrameError as error:
            self._broken = str(error)
            raise
        if used < len(data):
            rest += memoryview(data)[used:]
        return messages

    def end(self) -> None:
        """Say that no more bytes come. Raises FrameError when a frame is unfinished."""
        if self._rest and self._broken is None:
            self._broken = (
                f"the stream ended inside a frame: {len(self._rest)} of at least "
                f"{self._wanted_bytes} bytes came"
            )
            raise FrameError(self._broken)

    def _decode(self, data: bytes | bytearray | memoryview) -> tuple[list[Message], int]:
        view = memoryview(data)
        available = len(view)
        messages: list[Message] = []
        start = 0
        while available - start >= HEADER_BYTES:
            length, version = _HEADER.unpack_from(view, start)
            if version != PROTOCOL_VERSION or not 0 < length <= self._max_frame_bytes:
                _check_header(length, version, self._max_frame_bytes)
            end = start + _U32_BYTES + length
            if end > available:
                self._wanted_bytes = end - start
                return messages, start
            try:
                messages.append(_decode_msgpack(view[start + HEADER_BYTES : end]))
            except _UNDECODABLE as error:
                raise FrameError(
                    f"a frame of {length} bytes holds no message of protocol version "
                    f"{PROTOCOL_VERSION}: {error}"
                ) from error
            start = end
        self._wanted_bytes = HEADER_BYTES
        return messages, start


def _check_header(length: int, version: int, max_frame_bytes: int) -> None:
    """Raise FrameError saying what is wrong with a header."""
    if not 0 < length <= max_frame_bytes:
        raise FrameError(
            f"a frame announces {length} bytes, which is outside 1 to {max_frame_bytes}; "
            "does the other side speak another protocol?"
        )
    if version != PROTOCOL_VERSION:
        raise FrameError(
            f"the other side speaks protocol version {version}, this process version "
            f"{PROTOCOL_VERSION}; run the same release on both"
        )


class TokenBatch:
    """Gathers what one engine step made for one ingress, so that it leaves as one frame.

    A plain token (one token, nothing else to say) costs 8 bytes in two columns; every other chunk
    goes to ``rich``. Chunks of one stream keep their order.
    """

    __slots__ = ("_rich", "_rich_streams", "_streams", "_tokens")

    def __init__(self) -> None:
        self._streams = array(_U32)
        self._tokens = array(_U32)
        self._rich: list[tuple[int, TokenChunk]] = []
        self._rich_streams: set[int] = set()

    def add(self, stream: int, chunk: TokenChunk, first: bool = False) -> None:
        """Add a chunk. ``first`` says it is the stream's first one, which tells cached_tokens."""
        token_ids = chunk.token_ids
        # error_* and stop_token_id come with a finish_reason only, cached_tokens was in the first.
        if (
            not first
            and len(token_ids) == 1
            and chunk.finish_reason is None
            and chunk.logprobs is None
            and not chunk.num_hidden_tokens
            # Columns are read before rich: what follows a rich chunk of its stream is rich too.
            and stream not in self._rich_streams
        ):
            try:
                self._tokens.append(token_ids[0])
                self._streams.append(stream)
                return
            except OverflowError:  # beyond 32 bits (or negative): rich takes any number
                del self._tokens[len(self._streams) :]
        self._rich.append((stream, chunk))
        self._rich_streams.add(stream)

    def take(self) -> Tokens | None:
        """Return what was added since the last call as one message, or None; the batch is empty then."""
        streams, tokens, rich = self._streams, self._tokens, self._rich
        if not streams and not rich:
            return None
        if not _LITTLE_ENDIAN:
            streams.byteswap()
            tokens.byteswap()
        message = Tokens(streams.tobytes(), tokens.tobytes(), rich)
        del streams[:], tokens[:]
        if rich:
            self._rich = []
            self._rich_streams.clear()
        return message


def columns(tokens: Tokens) -> tuple[Sequence[int], Sequence[int]]:
    """Return (streams, token ids) of a message's plain tokens, to be walked with ``zip``.

    Raises FrameError when the columns are not two equally long rows of 32-bit numbers.
    """
    num_bytes = len(tokens.streams)
    if num_bytes != len(tokens.tokens) or num_bytes % _U32_BYTES:
        raise FrameError(
            f"a tokens message has columns of {num_bytes} and {len(tokens.tokens)} bytes; "
            "they must be equally long rows of 4-byte numbers"
        )
    streams, token_ids = array(_U32, tokens.streams), array(_U32, tokens.tokens)
    if not _LITTLE_ENDIAN:
        streams.byteswap()
        token_ids.byteswap()
    return streams, token_ids

"""Frames: any message survives any cut of the stream, and foreign bytes raise FrameError only."""

from __future__ import annotations

import contextlib
import itertools
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.errors import FrameError
from trtllm_workers.planes import frames
from trtllm_workers.planes.frames import PROTOCOL_VERSION, Decoder, TokenBatch, columns, encode
from trtllm_workers.planes.messages import (
    Abort,
    Drain,
    Message,
    Ping,
    Pong,
    Submit,
    Tokens,
    WorkerStats,
)
from trtllm_workers.types import (
    Address,
    EngineStats,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
addresses = st.builds(Address, text, st.integers(0, 65535), text, text)
finite = st.floats(allow_nan=False, width=64)
sampling = st.builds(
    SamplingParams,
    max_tokens=u32,
    temperature=finite,
    seed=st.none() | u64,
    logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=st.lists(u32, max_size=3).map(tuple),
    logit_bias=st.lists(st.tuples(u32, finite), max_size=3).map(tuple),
)
requests = st.builds(
    GenerateRequest,
    request_id=text,
    prompt_token_ids=st.lists(u32, max_size=50),
    sampling=sampling,
    cache_salt=text,
)
logprobs = st.builds(TokenLogprob, u32, finite, st.lists(st.tuples(u32, finite), max_size=2))
chunks = st.builds(
    TokenChunk,
    token_ids=st.lists(u32, max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    cached_tokens=u32,
    num_hidden_tokens=st.integers(0, 1),
    logprobs=st.none() | st.lists(logprobs, max_size=2).map(tuple),
    stop_token_id=st.none() | u32,
    error_code=st.none() | text,
    error_message=st.none() | text,
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Submit, u64, requests, addresses),
    st.builds(Abort, st.lists(u64, max_size=5), addresses),
    st.builds(
        Tokens,
        st.binary(max_size=64),
        st.binary(max_size=64),
        st.lists(st.tuples(u64, chunks), max_size=3),
    ),
    st.builds(Ping, u64),
    st.builds(Pong, u64),
    st.builds(Drain, text),
    st.builds(WorkerStats, text, st.builds(EngineStats, num_running=u64), u64),
)


@given(st.lists(messages, max_size=6), st.data())
def test_messages_come_back_however_the_stream_is_cut(
    sent: list[Message], data: st.DataObject
) -> None:
    stream = b"".join(encode(message) for message in sent)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    decoder = Decoder()
    received: list[Message] = []
    for start, end in itertools.pairwise([0, *cuts, len(stream)]):
        received += decoder.feed(stream[start:end])
    decoder.end()
    assert received == sent


def test_messages_come_back_when_fed_byte_by_byte() -> None:
    sent: list[Message] = [Ping(1), Drain("x" * 300), Pong(2)]
    decoder = Decoder()
    received = [
        m
        for byte in b"".join(encode(message) for message in sent)
        for m in decoder.feed(bytes([byte]))
    ]
    assert received == sent


@given(st.binary(max_size=200))
def test_foreign_bytes_raise_nothing_but_frame_errors(noise: bytes) -> None:
    decoder = Decoder()
    with contextlib.suppress(FrameError):
        decoder.feed(noise)
        decoder.end()


@given(st.binary(max_size=100))
def test_a_foreign_body_in_a_good_frame_raises_nothing_but_frame_errors(body: bytes) -> None:
    with contextlib.suppress(FrameError):
        Decoder().feed(frames.pack(body))


@given(messages, st.data())
def test_a_damaged_message_is_read_or_refused(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    decoder = Decoder()
    with contextlib.suppress(FrameError):
        for received in decoder.feed(damaged):
            if isinstance(received, Tokens):
                columns(received)


def framed(body: bytes, *, length: int | None = None, version: int = PROTOCOL_VERSION) -> bytes:
    return struct.pack("<IB", len(body) + 1 if length is None else length, version) + body


BAD = {
    "a length of 100 MB": (framed(b"", length=100_000_000), "announces 100000000 bytes"),
    "a length of nothing": (framed(b"", length=0), "announces 0 bytes"),
    "another protocol": (b"GET / HTTP/1.1\r\n", "another protocol"),
    "another version": (
        framed(b"x", version=9),
        f"protocol version 9, this process version {PROTOCOL_VERSION}",
    ),
    "an unknown tag": (framed(msgspec.msgpack.encode(["dance", 1])), "'dance'"),
    "a wrong field": (
        framed(msgspec.msgpack.encode(["ping", "one"])),
        r"Expected `int`, got `str`",
    ),
    "a missing field": (framed(msgspec.msgpack.encode(["ping"])), "length"),
    "a body cut short": (framed(encode(Drain("long"))[5:-2]), "truncated"),
    "a body too long": (framed(encode(Ping(1))[5:] + b"x"), "trailing"),
    "text that is not UTF-8": (framed(b"\x92\xa5drain\xa2\xff\xff"), "utf-8"),
    "arrays without end": (framed(b"\x93\xa5drain\xa2aa" + b"\x91" * 100_000), "recursion"),
    "four thousand million numbers": (framed(b"\x93\xa5abort\xdd\xff\xff\xff\xff"), "truncated"),
}


@pytest.mark.parametrize(("stream", "words"), BAD.values(), ids=BAD)
def test_frame_error_says_what_was_seen(stream: bytes, words: str) -> None:
    with pytest.raises(FrameError, match=words):
        Decoder().feed(stream)


def test_decoder_stays_broken_after_a_bad_frame() -> None:
    decoder = Decoder()
    with pytest.raises(FrameError):
        decoder.feed(framed(b"", length=0))
    with pytest.raises(FrameError, match="announces 0 bytes"):
        decoder.feed(encode(Ping(1)))


def test_stream_that_ends_inside_a_frame_is_an_error() -> None:
    decoder = Decoder()
    assert decoder.feed(encode(Ping(1)) + encode(Ping(2))[:-1]) == [Ping(1)]
    with pytest.raises(FrameError, match="ended inside a frame"):
        decoder.end()


def test_frame_over_the_limit_is_refused_by_its_sender() -> None:
    with pytest.raises(FrameError, match="over the limit of 33554432 bytes"):
        encode(Drain("x" * frames.MAX_FRAME_BYTES))


def test_decoder_honours_a_smaller_limit() -> None:
    with pytest.raises(FrameError, match="outside 1 to 64"):
        Decoder(max_frame_bytes=64).feed(encode(Drain("x" * 100)))


def test_take_body_leaves_an_unfinished_frame_alone() -> None:
    buffer = bytearray(encode(Ping(1))[:-1])
    assert frames.take_body(buffer, 64) is None
    buffer += encode(Ping(1))[-1:] + b"rest"
    assert frames.take_body(buffer, 64) == encode(Ping(1))[5:]
    assert buffer == b"rest"


# TokenBatch


def test_plain_tokens_take_the_columns_and_eight_bytes_each() -> None:
    batch = TokenBatch()
    for stream in range(128):
        batch.add(stream, TokenChunk((stream * 7,)))
    message = batch.take()
    assert message is not None
    assert message.rich == []
    assert len(message.streams) == len(message.tokens) == 128 * 4
    assert list(zip(*columns(message), strict=True)) == [(s, s * 7) for s in range(128)]
    assert batch.take() is None


TALKATIVE = {
    "two tokens": TokenChunk((1, 2)),
    "no token": TokenChunk(()),
    "the last": TokenChunk((1,), finish_reason=FinishReason.LENGTH),
    "a hidden eos": TokenChunk((1,), num_hidden_tokens=1),
    "logprobs": TokenChunk((1,), logprobs=(TokenLogprob(1, -0.5),)),
    "an id beyond 32 bits": TokenChunk((2**32,)),
}


@pytest.mark.parametrize("chunk", TALKATIVE.values(), ids=TALKATIVE)
def test_chunk_with_more_to_say_is_kept_whole(chunk: TokenChunk) -> None:
    batch = TokenBatch()
    batch.add(5, TokenChunk((9,)))
    batch.add(6, chunk)
    batch.add(7, TokenChunk((8,)))
    message = batch.take()
    assert message is not None
    assert message.rich == [(6, chunk)]
    assert list(zip(*columns(message), strict=True)) == [(5, 9), (7, 8)]


def test_first_chunk_of_a_stream_is_kept_whole() -> None:
    batch = TokenBatch()
    first = TokenChunk((1,), cached_tokens=64)
    batch.add(5, first, first=True)
    message = batch.take()
    assert message is not None
    assert message.rich == [(5, first)]


def test_stream_number_beyond_32_bits_is_kept_whole() -> None:
    batch = TokenBatch()
    batch.add(2**32, TokenChunk((1,)))
    batch.add(3, TokenChunk((2,)))
    message = batch.take()
    assert message is not None
    assert message.rich == [(2**32, TokenChunk((1,)))]
    assert list(zip(*columns(message), strict=True)) == [(3, 2)]


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), chunks, st.booleans()), max_size=10), max_size=4)
)
def test_batch_loses_nothing_and_keeps_the_order_of_each_stream(
    steps: list[list[tuple[int, TokenChunk, bool]]],
) -> None:
    batch, decoder = TokenBatch(), Decoder()
    sent: dict[int, list[tuple[int, ...]]] = {}
    received: dict[int, list[tuple[int, ...]]] = {}
    for step in steps:
        for stream, chunk, first in step:
            batch.add(stream, chunk, first=first)
            sent.setdefault(stream, []).append(chunk.token_ids)
        message = batch.take()
        for tokens in decoder.feed(encode(message)) if message else []:
            assert isinstance(tokens, Tokens)
            for stream, token in zip(*columns(tokens), strict=True):
                received.setdefault(stream, []).append((token,))
            for stream, chunk in tokens.rich:
                received.setdefault(stream, []).append(chunk.token_ids)
    assert received == sent


def test_message_taken_is_not_touched_by_later_chunks() -> None:
    batch = TokenBatch()
    batch.add(1, TokenChunk((1, 2)))
    message = batch.take()
    batch.add(1, TokenChunk((3, 4)))
    assert message is not None
    assert message.rich == [(1, TokenChunk((1, 2)))]


@pytest.mark.parametrize(("streams", "tokens"), [(b"1234", b""), (b"123", b"123")])
def test_columns_that_do_not_fit_are_refused(streams: bytes, tokens: bytes) -> None:
    with pytest.raises(FrameError, match="equally long"):
        columns(Tokens(streams, tokens, []))


def test_columns_are_little_endian_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TokenBatch()
    batch.add(1, TokenChunk((0x01020304,)))
    message = batch.take()
    assert message is not None
    assert message.tokens == b"\4\3\2\1"
    # On a big-endian machine array reads the bytes the other way round and is swapped back.
    monkeypatch.setattr(frames, "_LITTLE_ENDIAN", False)
    swapped = Tokens(message.streams[::-1], message.tokens[::-1], [])
    assert list(zip(*columns(swapped), strict=True)) == [(1, 0x01020304)]

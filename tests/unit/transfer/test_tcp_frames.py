from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.transport_peer import make_layout
from trtllm_workers.errors import TransferFailed
from trtllm_workers.transfer.tcp_frames import (
    HEAD,
    MAX_FRAME_BYTES,
    VERSION,
    Challenge,
    Done,
    Frame,
    Hello,
    Notify,
    Proof,
    Read,
    Ready,
    Refusal,
    Welcome,
    Write,
    pack,
    pack_ids,
    printable,
    proof,
    refusal,
    same,
    unpack,
    unpack_ids,
    welcome_proof,
)

LAYOUT = make_layout(4096)
HELLO = Hello(VERSION, "tcp", "decode-0", b"a" * 32)
CHALLENGE = Challenge("prefill-0", b"b" * 32)
FRAMES: list[Frame] = [
    HELLO,
    CHALLENGE,
    Proof(b"c" * 32),
    Welcome(b"d" * 32, LAYOUT, 7),
    Refusal("no"),
    Read(pack_ids([1, 2]), 0.5),
    Write(pack_ids([]), 2.0),
    Notify(b"\x00\xff"),
    Ready(),
    Done(),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_survives_the_way(frame: Frame) -> None:
    packed = pack(frame)
    assert HEAD.unpack(packed[: HEAD.size]) == (len(packed) - HEAD.size,)
    assert unpack(packed[HEAD.size :]) == frame


@given(st.binary(max_size=200))
def test_foreign_bytes_are_no_frame_or_a_whole_one(body: bytes) -> None:
    try:
        frame = unpack(body)
    except TransferFailed as error:
        assert "does not speak this protocol" in str(error)  # noqa: PT017 — most bytes are none
    else:
        assert isinstance(frame, Frame)


def test_a_frame_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(TransferFailed, match="send it in parts"):
        pack(Notify(bytes(MAX_FRAME_BYTES)))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_block_ids_survive_the_way(block_ids: list[int]) -> None:
    assert list(unpack_ids(pack_ids(block_ids))) == block_ids


def test_half_a_block_id_is_refused() -> None:
    with pytest.raises(TransferFailed, match="7 bytes are no list"):
        unpack_ids(bytes(7))


def test_a_proof_fits_one_token_one_direction_and_one_greeting() -> None:
    token = b"t" * 32
    proofs = {
        proof(token, HELLO, CHALLENGE),
        proof(b"u" * 32, HELLO, CHALLENGE),
        proof(token, Hello(VERSION, "tcp", "decode-0", b"z" * 32), CHALLENGE),
        proof(token, Hello(VERSION, "nixl", "decode-0", b"a" * 32), CHALLENGE),
        proof(token, Hello(VERSION, "tcp", "decode-1", b"a" * 32), CHALLENGE),
        proof(token, HELLO, Challenge("prefill-0", b"z" * 32)),
        welcome_proof(token, HELLO, CHALLENGE, LAYOUT, 7),
        welcome_proof(token, HELLO, CHALLENGE, LAYOUT, 8),
        welcome_proof(token, HELLO, CHALLENGE, make_layout(8192), 7),
    }
    assert len(proofs) == 9
    assert same(proof(token, HELLO, CHALLENGE), proof(token, HELLO, CHALLENGE))


def test_a_refusal_is_bounded_and_printable() -> None:
    assert len(refusal("x" * 10_000).message) == 500
    assert printable("a\x1b[31m\n") == "a?[31m?"

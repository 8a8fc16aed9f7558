"""What ends of a ucx link say where no one-sided wire reaches."""

from __future__ import annotations

import msgspec
import pytest

from trtllm_workers.transfer.ucx_pieces import SEGMENT_BYTES, Pieces
from trtllm_workers.transfer.ucx_talk import (
    Done,
    Hello,
    Notify,
    Read,
    Ready,
    Refused,
    Welcome,
    Write,
    decode_answer,
    decode_ask,
    encode,
    segments_of_pool,
)

POOL = (1000, 4 * SEGMENT_BYTES)  # where it begins, how long it is


def reading(offsets: list[int], lengths: list[int]) -> Read:
    return Read(b"t", 7, 1, offsets, lengths, 2.5)


@pytest.mark.parametrize(
    "ask",
    [
        Hello(b"token", 2**63 - 1, "w0", b"address"),
        reading([0, 5], [5, 9]),
        Write(b"token", 1, [0], [5], 0.5),
        Notify(b"token", 1, b"message"),
    ],
)
def test_asks_come_back_as_they_were(ask: Hello | Read | Write | Notify) -> None:
    assert decode_ask(encode(ask)) == ask


@pytest.mark.parametrize("answer", [Welcome(), Ready(2**62), Done(), Refused("no")])
def test_answers_come_back_as_they_were(answer: Welcome | Ready | Done | Refused) -> None:
    assert decode_answer(encode(answer)) == answer


def test_an_answer_is_no_ask() -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_ask(encode(Done()))


def test_ranges_become_addresses_of_the_pool_a_segment_each() -> None:
    found = segments_of_pool(reading([3, SEGMENT_BYTES], [2, SEGMENT_BYTES + 1]), *POOL)
    assert isinstance(found, Pieces)
    assert found.local == [1003, 1000 + SEGMENT_BYTES, 1000 + 2 * SEGMENT_BYTES]
    assert found.lengths == [2, SEGMENT_BYTES, 1]


def test_both_ends_cut_the_same() -> None:
    theirs = segments_of_pool(reading([0], [3 * SEGMENT_BYTES - 1]), *POOL)
    assert isinstance(theirs, Pieces)
    assert theirs.lengths == Pieces([9], [0], [3 * SEGMENT_BYTES - 1]).segments().lengths


@pytest.mark.parametrize(
    ("offsets", "lengths"),
    [
        ([-1], [4]),
        ([0], [0]),
        ([0], [-4]),
        ([0], [4 * SEGMENT_BYTES + 1]),
        ([4 * SEGMENT_BYTES], [1]),
        ([2**62], [2**62]),
        ([0, 1], [1]),
    ],
)
def test_ranges_outside_the_pool_are_told(offsets: list[int], lengths: list[int]) -> None:
    assert isinstance(segments_of_pool(reading(offsets, lengths), *POOL), str)

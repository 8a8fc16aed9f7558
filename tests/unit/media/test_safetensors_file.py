from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.media.support import safetensors
from trtllm_workers.media.safetensors_file import (
    MAX_HEADER_BYTES,
    BadFile,
    EmbeddingsFile,
    Tensor,
    header_bytes,
    read_header,
)

GOOD: dict[str, Any] = {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def read(file: bytes) -> EmbeddingsFile:
    length = header_bytes(file[:8], len(file))
    return read_header(file[8 : 8 + length], len(file))


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": GOOD["x"] | changes}


def test_one_tensor_of_any_name() -> None:
    file = safetensors(GOOD, bytes(24))
    assert read(file) == EmbeddingsFile(Tensor("F32", (2, 3), len(file) - 24, 24), None, "")


def test_embeddings_with_their_grid_and_who_made_them() -> None:
    header = {
        "__metadata__": {"format": "pt", "trtllm_launch.made_by": "00ff"},
        "image_grid_thw": {"dtype": "I64", "shape": [1, 3], "data_offsets": [0, 24]},
        "mm_embeddings": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [24, 36]},
    }
    file = safetensors(header, bytes(36))
    found = read(file)
    assert found.made_by == "00ff"
    assert found.embeddings == Tensor("BF16", (2, 3), len(file) - 12, 12)
    assert found.grid == Tensor("I64", (1, 3), len(file) - 36, 24)


def test_padding_of_the_header_as_writers_make_it() -> None:
    found = read(safetensors(json.dumps(GOOD).encode() + b"   ", bytes(24)))
    assert found.embeddings.num_bytes == 24


@pytest.mark.parametrize(
    ("first", "size"),
    [
        (b"", 0),
        (b"\2\0\0", 3),
        (b"\0" * 8, 100),
        (b"\1" + b"\0" * 7, 100),
        ((93).to_bytes(8, "little"), 100),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 1 << 40),
        (b"\xff" * 8, 1 << 40),
        ((1 << 63).to_bytes(8, "little"), 100),
    ],
)
def test_impossible_lengths_of_the_header(first: bytes, size: int) -> None:
    with pytest.raises(BadFile):
        header_bytes(first, size)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"{}",
        b'"x"',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        {"x": 1},
        {"x": {}},
        {"__metadata__": {"format": "pt"}},
        {"__metadata__": {"a": 1}} | GOOD,
        {"__metadata__": []} | GOOD,
        {"__metadata__": {"trtllm_launch.made_by": "../x"}} | GOOD,
        entry(more=1),
        entry(dtype="F31"),
        entry(dtype=1),
        entry(dtype="f32"),
        entry(shape=[2, 4]),
        entry(shape=[-2, -3]),
        entry(shape=[2, 3, 0]),
        entry(shape=[2.0, 3]),
        entry(shape=["2", 3]),
        entry(shape=[True, 6]),
        entry(shape=[1 << 63, 2]),
        entry(shape=[1 << 100, 0]),
        entry(shape=[1 << 62, 1 << 62, 0]),
        entry(shape=[1] * 9),
        entry(shape=6),
        entry(data_offsets=[0, 25]),
        entry(data_offsets=[24, 0]),
        entry(data_offsets=[-24, 0]),
        entry(data_offsets=[0, 1 << 63]),
        entry(data_offsets=[1 << 64, (1 << 64) + 24]),
        entry(data_offsets=[0]),
        entry(data_offsets=[0, 24, 48]),
        entry(data_offsets=[0.0, 24.0]),
        # Overlapping, with a hole, and one after the end.
        GOOD | {"y": GOOD["x"]},
        GOOD | {"y": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]}},
        {"x": {"dtype": "U8", "shape": [8], "data_offsets": [16, 24]}},
        GOOD | {"y": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]}},
        {str(index): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for index in range(99)},
        {"x" * 300: GOOD["x"]},
    ],
)
def test_lies_of_the_header(header: Any) -> None:
    with pytest.raises(BadFile):
        read(safetensors(header, bytes(24)))


def test_bytes_that_no_tensor_owns_are_refused() -> None:
    with pytest.raises(BadFile, match="do not end"):
        read(safetensors(GOOD, bytes(25)))
    with pytest.raises(BadFile, match="do not end"):
        read(safetensors(GOOD, bytes(23)))


def test_tensors_that_would_be_ignored_are_refused_by_name() -> None:
    grid = {"dtype": "I64", "shape": [3], "data_offsets": [24, 48]}
    for name in ("special_tokens", "offsets"):
        header = {"mm_embeddings": GOOD["x"], name: grid}
        with pytest.raises(BadFile, match=name):
            read(safetensors(header, bytes(48)))
    with pytest.raises(BadFile, match="mm_embeddings"):
        read(safetensors({"x": GOOD["x"], "image_grid_thw": grid}, bytes(48)))
    with pytest.raises(BadFile, match="mm_embeddings"):
        read(safetensors({"image_grid_thw": grid | {"data_offsets": [0, 24]}}, bytes(24)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=10,
)
NUMBERS = st.integers(-2, 60) | st.integers(-(1 << 70), 1 << 70)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F64", "U8", "X"]) | JSON,
        "shape": st.lists(NUMBERS, max_size=4) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=400, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["x", "mm_embeddings", "image_grid_thw"]), ENTRY | JSON)
    | JSON
    | st.binary(max_size=60),
    body=st.integers(0, 60),
    length=st.none() | st.integers(0, (1 << 64) - 1),
)
def test_whatever_a_file_says_nothing_outside_of_it_is_ever_named(
    header: Any, body: int, length: int | None
) -> None:
    file = safetensors(header, bytes(body))
    if length is not None:
        file = length.to_bytes(8, "little") + file[8:]
    try:
        found = read(file)
    except BadFile:
        return
    for tensor in filter(None, (found.embeddings, found.grid)):
        assert 8 <= tensor.begin <= tensor.begin + tensor.num_bytes <= len(file)
        assert all(dim >= 0 for dim in tensor.shape)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_a_file_with_one_wrong_byte(at: int, value: int) -> None:
    file = bytearray(safetensors(GOOD, bytes(24)))
    file[at % len(file)] = value
    try:
        found = read(bytes(file))
    except BadFile:
        return
    assert found.embeddings.begin + found.embeddings.num_bytes == len(file)

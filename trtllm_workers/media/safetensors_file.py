"""The header of a .safetensors file, checked before anything in it is used. Pure; reads no tensor.

A file is 8 bytes of header length (little endian), the header (JSON), then the tensors' bytes without
holes. What the header says is a stranger's word until it has passed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import msgspec

EMBEDDINGS = "mm_embeddings"
GRID = "image_grid_thw"
MADE_BY = "trtllm_launch.made_by"

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 1 << 20
VALUE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

_MOST_TENSORS = 64
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 256
_METADATA = "__metadata__"
_MADE_BY = re.compile(r"[0-9a-f]{1,128}")


class BadFile(ValueError):
    """What is wrong with a file, in words for whoever made it; nothing of its content but names."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a file: ``begin`` counts from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class EmbeddingsFile:
    """The tensors of a file that count, and which vision tower made it; "" if the file does not say."""

    embeddings: Tensor
    grid: Tensor | None
    made_by: str


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def header_bytes(first: bytes, num_bytes: int) -> int:
    """Return the length of the header of a file of so many bytes, from its first 8. Raises BadFile."""
    length = int.from_bytes(first, "little")
    if len(first) < LENGTH_BYTES or num_bytes < LENGTH_BYTES:
        raise BadFile("it is too short for a .safetensors file")
    if not 2 <= length <= min(MAX_HEADER_BYTES, num_bytes - LENGTH_BYTES):
        raise BadFile("its header's length is impossible")
    return length


def read_header(header: bytes, num_bytes: int) -> EmbeddingsFile:
    """Return what a header tells of a file of ``num_bytes``. Raises BadFile."""
    try:
        found = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(found.pop(_METADATA, b"{}"), type=dict[str, str])
        entries = {name: msgspec.json.decode(raw, type=_Entry) for name, raw in found.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFile("its header is not that of a .safetensors file") from error
    if len(entries) > _MOST_TENSORS or any(len(name) > _LONGEST_NAME for name in entries):
        raise BadFile("it has too many tensors, or names that are too long")
    start = LENGTH_BYTES + len(header)
    tensors = {name: _tensor(name, entry, start) for name, entry in entries.items()}
    _check_no_holes(tensors, start, num_bytes)
    made_by = metadata.get(MADE_BY, "")
    if made_by and not _MADE_BY.fullmatch(made_by):
        raise BadFile(f"its metadata {MADE_BY!r} is not a hexadecimal number")
    embeddings, grid = _choose(tensors)
    return EmbeddingsFile(embeddings, grid, made_by)


def _tensor(name: str, entry: _Entry, start: int) -> Tensor:
    value_bytes = VALUE_BYTES.get(entry.dtype)
    if value_bytes is None:
        raise BadFile(f"its tensor {name!r} has an unknown dtype")
    if len(entry.shape) > _MOST_DIMENSIONS or any(dim < 0 or dim >> 40 for dim in entry.shape):
        raise BadFile(f"its tensor {name!r} has an impossible shape")
    begin, end = entry.data_offsets
    if not 0 <= begin <= end or end - begin != prod(entry.shape) * value_bytes:
        raise BadFile(f"the offsets of its tensor {name!r} do not fit its shape and dtype")
    return Tensor(entry.dtype, entry.shape, start + begin, end - begin)


def _check_no_holes(tensors: Mapping[str, Tensor], start: int, num_bytes: int) -> None:
    at = start
    for tensor in sorted(tensors.values(), key=lambda one: (one.begin, one.num_bytes)):
        if tensor.begin != at:
            raise BadFile("its tensors overlap, or leave holes")
        at += tensor.num_bytes
    if at != num_bytes:
        raise BadFile("its tensors do not end where the file does")


def _choose(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    if len(tensors) == 1:
        [(name, only)] = tensors.items()
        if name != GRID:
            return only, None
    if EMBEDDINGS not in tensors:
        raise BadFile(
            f"it has to hold one tensor of embeddings, or one named {EMBEDDINGS!r} beside others"
        )
    unknown = sorted(tensors.keys() - {EMBEDDINGS, GRID})
    if unknown:
        raise BadFile(
            f"its tensor {unknown[0]!r} is not used here; only {EMBEDDINGS!r} and {GRID!r} are"
        )
    return tensors[EMBEDDINGS], tensors.get(GRID)

"""From a .safetensors file to rows of embeddings in claimed memory: shape, dtype and values checked.

Rows go from the file straight into their place, chunk by chunk: each is read, looked through and hashed
while it is in the processor's caches. Chunks know nothing of each other, so threads share them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from trtllm_workers.media.descriptors import Descriptor
from trtllm_workers.media.digest import chunk_digest, digest
from trtllm_workers.media.safetensors_file import (
    EMBEDDINGS,
    GRID,
    LENGTH_BYTES,
    VALUE_BYTES,
    BadFile,
    EmbeddingsFile,
    Tensor,
    header_bytes,
    read_header,
)
from trtllm_workers.media.values import FLOATS, MODEL_DTYPES, all_finite, convert
from trtllm_workers.types import VisionInfo

Grid = tuple[int, int, int]

# Digests are over chunks of this size, so it is the same everywhere. Larger ones leave the cache between
# being read and being hashed (a quarter slower at 4 MiB); for smaller ones threads wait more often for the
# interpreter.
CHUNK_BYTES = 1 << 20

_LARGEST_SIDE = 1 << 20
_MOST_PIECES = 512  # the system takes no more than 1024 at once
_WORD = 8


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a file: ``num_tokens`` rows that begin at byte ``begin``."""

    begin: int
    num_tokens: int
    grid: Grid | None


@dataclass(frozen=True, slots=True)
class Rows:
    """What a file holds, for a model: rows of ``hidden_size`` values of ``dtype`` that become ``to``."""

    images: tuple[Image, ...]
    hidden_size: int
    dtype: str
    to: str
    made_by: str

    def num_bytes(self, image: Image) -> int:
        """Return how many bytes an image's rows have in the model's dtype."""
        return image.num_tokens * self.hidden_size * VALUE_BYTES[self.to]


def read_rows(file: Descriptor, num_bytes: int, vision: VisionInfo, max_images: int) -> Rows:
    """Return what a file of ``num_bytes`` holds. Raises BadFile unless it fits the model. It blocks."""
    length = header_bytes(os.pread(file.fd, LENGTH_BYTES, 0), num_bytes)
    header = os.pread(file.fd, length, LENGTH_BYTES)
    if len(header) != length:
        raise BadFile("it changed while it was read")
    found = read_header(header, num_bytes)
    to = MODEL_DTYPES.get(vision.dtype)
    if to is None:
        raise BadFile(f"embeddings in the model's dtype, {vision.dtype}, are not known here")
    return Rows(
        images=_images(file, found, vision.hidden_size, max_images),
        hidden_size=vision.hidden_size,
        dtype=found.embeddings.dtype,
        to=to,
        made_by=found.made_by,
    )


def fill(
    file: Descriptor,
    rows: Rows,
    image: Image,
    runs: Sequence[memoryview],
    first: int = 0,
    step: int = 1,
    check: Callable[[], None] = lambda: None,
) -> list[bytes]:
    """Fill chunks ``first``, ``first + step``, … of an image's room; return their digests. It blocks.

    Raises BadFile for values that are not finite and for a file that ended meanwhile. ``check`` is called
    before each chunk, to end it by an error.
    """
    found = []
    scale = VALUE_BYTES[rows.dtype], VALUE_BYTES[rows.to]
    total = rows.num_bytes(image)
    for begin in range(first * CHUNK_BYTES, total, step * CHUNK_BYTES):
        check()
        pieces = _pieces(runs, begin, min(begin + CHUNK_BYTES, total))
        at = image.begin + begin // scale[1] * scale[0]
        if rows.dtype == rows.to:
            _read(file.fd, pieces, at)
            if not all(all_finite(piece, rows.to) for piece in pieces):
                raise BadFile("it has values that are not finite (NaN or infinity)")
        else:
            _convert(file.fd, pieces, at, rows)
        found.append(chunk_digest(pieces))
    return found


def content(rows: Rows, image: Image, chunks: Sequence[bytes]) -> bytes:
    """Return the digest of an image's rows, from those of its chunks in order."""
    kind = f"{rows.to} {image.num_tokens} {rows.hidden_size} {image.grid}"
    return digest(kind.encode(), b"".join(chunks))


def num_chunks(num_bytes: int) -> int:
    """Return how many chunks so many bytes have."""
    return -(-num_bytes // CHUNK_BYTES)


def _images(
    file: Descriptor, found: EmbeddingsFile, hidden_size: int, max_images: int
) -> tuple[Image, ...]:
    tensor = found.embeddings
    if tensor.dtype not in FLOATS:
        raise BadFile(
            f"its embeddings are {tensor.dtype}; they have to be one of {', '.join(FLOATS)}"
        )
    if len(tensor.shape) not in (2, 3):
        raise BadFile(
            "its embeddings have the shape (num_tokens, hidden_size) or (num_images, num_tokens, "
            f"hidden_size); this one has {len(tensor.shape)} dimensions"
        )
    count, tokens, hidden = (1, *tensor.shape)[-3:]
    if hidden != hidden_size:
        raise BadFile(f"its embeddings are {hidden} wide, those of the model {hidden_size}")
    if not tokens or not count:
        raise BadFile("it holds no embeddings")
    if count > max_images:
        raise BadFile(f"it holds {count} images; a request may have {max_images}")
    grids = _grids(file, found.grid, count)
    each = tensor.num_bytes // count
    return tuple(
        Image(tensor.begin + index * each, tokens, grid) for index, grid in enumerate(grids)
    )


def _grids(file: Descriptor, tensor: Tensor | None, count: int) -> list[Grid | None]:
    if tensor is None:
        return [None] * count
    fits = tensor.shape == (count, 3) or (count == 1 and tensor.shape == (3,))
    if tensor.dtype not in ("I64", "I32") or not fits:
        raise BadFile(
            f"its {GRID!r} has to be integers of shape (num_images, 3), one for each image of "
            f"{EMBEDDINGS!r}: {count}"
        )
    values = np.frombuffer(
        os.pread(file.fd, tensor.num_bytes, tensor.begin),
        np.int64 if tensor.dtype == "I64" else np.int32,
    )
    if values.size != prod(tensor.shape):
        raise BadFile("it changed while it was read")
    if values.min() < 1 or values.max() > _LARGEST_SIDE:
        raise BadFile(f"its {GRID!r} has impossible values")
    sides = [int(value) for value in values]
    return [(sides[at], sides[at + 1], sides[at + 2]) for at in range(0, len(sides), 3)]


def _pieces(runs: Sequence[memoryview], begin: int, end: int) -> list[memoryview]:
    """Return the bytes from ``begin`` to ``end`` of memory that lies in runs."""
    found = []
    for run in runs:
        if begin < run.nbytes and end > 0:
            found.append(run[max(begin, 0) : min(end, run.nbytes)])
        begin -= run.nbytes
        end -= run.nbytes
    return found


def _read(fd: int, pieces: Sequence[memoryview], at: int) -> None:
    left = list(pieces)
    while left:
        got = os.preadv(fd, left[:_MOST_PIECES], at)
        if not got:
            raise BadFile("it changed while it was read")
        at += got
        while left and got >= left[0].nbytes:
            got -= left.pop(0).nbytes
        if got:
            left[0] = left[0][got:]


def _convert(fd: int, pieces: Sequence[memoryview], at: int, rows: Rows) -> None:
    ratio = VALUE_BYTES[rows.dtype], VALUE_BYTES[rows.to]
    for piece in pieces:
        source = memoryview(bytearray(piece.nbytes // ratio[1] * ratio[0]))
        _read(fd, [source], at)
        at += source.nbytes
        if not all_finite(source, rows.dtype):
            raise BadFile("it has values that are not finite (NaN or infinity)")
        piece[:] = convert(source, rows.dtype, rows.to).tobytes()
        if not all_finite(piece, rows.to):
            raise BadFile("it has values that are too large for the model's dtype")


assert CHUNK_BYTES % _WORD == 0  # chunks hold whole values of every dtype

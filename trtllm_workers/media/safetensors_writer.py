"""Writes .safetensors files: a JSON header, then the tensors one after the other. Knows no model."""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Tensors begin at a multiple of this, so that readers may map them.
_ALIGNMENT = 64
_DTYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as bytes: ``pieces`` follow each other, little-endian and contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[bytes | bytearray | memoryview]


def write_safetensors(path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file that is there whole or not at all; one that is there is replaced.

    The header is padded so that the first tensor is aligned; give the widest dtype first.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_header(tensors, metadata))
            for tensor in tensors:
                for piece in tensor.pieces:
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)  # as a file that was simply opened
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> bytes:
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for tensor in tensors:
        code, size = _DTYPES[tensor.dtype]
        end = at + math.prod(tensor.shape) * size
        if end - at != sum(len(memoryview(piece).cast("B")) for piece in tensor.pieces):
            raise ValueError(f"{tensor.name}: its bytes are not those of its shape")
        described[tensor.name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text

"""Numbers in raw bytes: are they all finite, and the same numbers in another dtype. Uses numpy only.

numpy has no bfloat16; its bits are handled as the upper half of a float32's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Names of dtypes in .safetensors files, and the model's dtypes that they are.
MODEL_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FLOATS = ("BF16", "F16", "F32", "F64")

_UNSIGNED: dict[str, type[np.unsignedinteger[Any]]] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.uint32,
    "F64": np.uint64,
}
_SIGNED: dict[str, type[np.signedinteger[Any]]] = {
    "BF16": np.int16,
    "F16": np.int16,
    "F32": np.int32,
    "F64": np.int64,
}
# The bits of infinity. Whatever has all of them in its exponent is not a number, or infinite.
_INFINITE = {
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
}
_SIGN = {"BF16": 1 << 15, "F16": 1 << 15, "F32": 1 << 31, "F64": 1 << 63}


def all_finite(values: memoryview, dtype: str) -> bool:
    """Whether there is no NaN and no infinity among these values."""
    if not values.nbytes:
        return True
    # Bits of floats are ordered as integers, by magnitude within a sign: two maxima suffice, and they
    # read without writing. Positive ones are the greatest signed integers, negative ones the greatest
    # unsigned ones.
    bits = np.frombuffer(values, _SIGNED[dtype])
    if int(bits.max()) >= _INFINITE[dtype]:
        return False
    return int(bits.view(_UNSIGNED[dtype]).max()) < _INFINITE[dtype] + _SIGN[dtype]


def convert(values: bytes | memoryview, dtype: str, to: str) -> NDArray[Any]:
    """Return finite values of one dtype in another, rounded to the nearest; too large ones are infinite."""
    if dtype == to:
        return np.frombuffer(values, _UNSIGNED[to])
    with np.errstate(over="ignore"):
        single = _single(values, dtype)
        if to == "F32":
            return single
        if to == "F16":
            return single.astype(np.float16)
    bits = single.view(np.uint32)
    # To the nearest, ties to the even one; a finite float32 cannot overflow 32 bits here.
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _single(values: bytes | memoryview, dtype: str) -> NDArray[np.float32]:
    match dtype:
        case "BF16":
            return (np.frombuffer(values, np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return np.frombuffer(values, np.float16).astype(np.float32)
        case "F32":
            return np.frombuffer(values, np.float32)
    return np.frombuffer(values, np.float64).astype(np.float32)

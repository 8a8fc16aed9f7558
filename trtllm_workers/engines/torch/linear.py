"""Matrix products whose rows do not depend on how many rows are computed. Knows no model.

Greedy output may not depend on batch mates or chunking, so row i of a product must come out the
same, bit for bit, whatever the number of rows. Plain ``F.linear`` picks other kernels for other row
counts. Two ways that keep the promise:

* ``PackedLinear``: weights reordered once for oneDNN. The batch hint fixes the layout and with it
  the order of each sum; measured for 1 to 4096 rows (tests/unit/torch_engine/test_invariance.py), and
  faster as well. Sums longer than 1024 are cut by row count, so such weights are split and their
  pieces added in order. In bfloat16 sums shorter than 64 round otherwise for a single row, so there
  weights are padded with zeros to multiples of 64.
* ``BucketLinear``: pads to buckets of a fixed row count, so every call is the same call. Slower, for
  processors without oneDNN's kernels and for CUDA.

``invariance.py`` checks at start-up that the way taken holds here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

MAX_INNER = 1024
STEP = 64
_HINTS = {torch.bfloat16: 1, torch.float32: 32}
CPU_BUCKET = 32
CUDA_BUCKET = 128


class Linear(Protocol):
    """``x`` [rows, in] → [rows, out]; ``residual`` [rows, out] is added if given."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor: ...


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs weights of this dtype here."""
    if device.type != "cpu" or dtype not in _HINTS or not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, *, device: torch.device, packed: bool
) -> Linear:
    """Return the product with ``weight`` [out, in]; the caller may drop the weight afterwards."""
    if packed:
        return PackedLinear(weight, bias)
    return BucketLinear(
        weight.to(device, copy=True),
        None if bias is None else bias.to(device, copy=True),
        CUDA_BUCKET if device.type == "cuda" else CPU_BUCKET,
    )


class PackedLinear:
    """See the module. Two threads or one, the result is the same."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        inner = weight.shape[1]
        self._missing = -inner % STEP if weight.dtype is torch.bfloat16 else 0
        weight = functional.pad(weight, (0, self._missing))
        inner += self._missing
        num_pieces = -(-inner // MAX_INNER)
        size = -(-inner // num_pieces // STEP) * STEP
        hint = _HINTS[weight.dtype]
        self._bias = None if bias is None else bias.clone()
        self._pieces = [
            (
                first,
                min(first + size, inner),
                torch.ops.mkldnn._reorder_linear_weight(
                    weight[:, first : first + size].contiguous(), hint
                ),
            )
            for first in range(0, inner, size)
        ]

    def memory(self) -> list[tuple[int, int]]:
        """Return address and bytes of each packed piece."""
        return [
            (torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight))
            for _first, _end, weight in self._pieces
        ]

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if self._missing:
            x = functional.pad(x, (0, self._missing))
        if len(self._pieces) == 1:
            weight = self._pieces[0][2]
            if residual is None:
                return _product(x, weight, self._bias)
            return _product_plus(x, residual, weight, self._bias)
        out: torch.Tensor | None = None
        for first, end, weight in self._pieces:
            part = x[:, first:end].contiguous()
            if out is None:
                out = _product(part, weight, self._bias)
            else:
                out = _product_plus(part, out, weight, None)
        assert out is not None  # a weight has columns
        # Added last: in bfloat16 each addition onto the larger residual would round again.
        return out if residual is None else out.add_(residual)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # The overload by name: resolving it takes as long as a small product.
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


def _product_plus(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    return out


class BucketLinear:
    """See the module."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, bucket: int) -> None:
        self._weight = weight
        self._bias = bias
        self._bucket = bucket

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        rows = x.shape[0]
        missing = -rows % self._bucket
        padded = functional.pad(x, (0, 0, 0, missing)) if missing else x
        parts = [
            functional.linear(part, self._weight, self._bias)
            for part in torch.split(padded, self._bucket)
        ]
        out = (parts[0] if len(parts) == 1 else torch.cat(parts))[:rows]
        return out if residual is None else out + residual

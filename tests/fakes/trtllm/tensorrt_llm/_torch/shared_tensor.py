"""Handles of tensors in another process's memory: here a file, which is gone once it was opened."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch


class SharedTensorContainer:
    """A tensor that somebody else may take over."""

    def __init__(self, handle: dict[str, Any]) -> None:
        self._handle = handle

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> SharedTensorContainer:
        """Give a tensor away."""
        with tempfile.NamedTemporaryFile(prefix="fake-trtllm-", delete=False) as file:
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return cls(
            {
                "method_key": 1,
                "tensor_size": list(tensor.shape),
                "tensor_handle": file.name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
        )

    def dump_to_dict(self) -> dict[str, Any]:
        """Return the handle."""
        return self._handle

    @classmethod
    def from_dict(cls, handle: dict[str, Any]) -> SharedTensorContainer:
        """Return what a handle stands for."""
        return cls(handle)

    def get_local_view(self) -> torch.Tensor:
        """Open the tensor; its memory is ours from now on, so a second time there is nothing."""
        path = Path(self._handle["tensor_handle"])
        flat = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        path.unlink()
        dtype = getattr(torch, self._handle["dtype"])
        return flat.view(dtype).view(self._handle["tensor_size"])

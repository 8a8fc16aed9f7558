"""Pickled files of tensors in a sandboxed child: opened by torch, given back as safetensors. Imports torch."""

from __future__ import annotations

import mmap
import os

import msgspec
import torch

from trtllm_workers.media.jobs import UNNAMED, Job, Refused, Reply, Unpickle, Unpickled, Why

_MOST_TENSORS = 64
_LONGEST_NAME = 256
_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_LENGTH_BYTES = 8
_LONGEST_DETAILS = 300

torch.set_num_threads(1)


def handle(job: Job, fds: list[int]) -> Reply:
    """Do a job on a pickled file."""
    if not isinstance(job, Unpickle) or len(fds) != 2:
        raise ValueError("not a job for pickled files")
    source, target = fds
    with os.fdopen(os.dup(source), "rb") as file:
        file.seek(0)
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except RuntimeError as error:
            if "allocate memory" in str(error):  # torch has no type for it
                return Refused(Why.MEMORY, str(error)[:_LONGEST_DETAILS])
            raise
    tensors = {UNNAMED: found} if isinstance(found, torch.Tensor) else found
    if not isinstance(tensors, dict) or not 0 < len(tensors) <= _MOST_TENSORS:
        return Refused(Why.TENSORS)
    if not all(isinstance(name, str) and len(name) <= _LONGEST_NAME for name in tensors):
        return Refused(Why.NAMES)
    if not all(map(_is_plain, tensors.values())):
        return Refused(Why.TENSORS)
    # By shape: a small file can hold a tensor whose rows are all the same memory.
    if sum(tensor.nbytes for tensor in tensors.values()) > job.max_bytes:
        return Refused(Why.TOO_LARGE)
    return _write(tensors, target)


def _is_plain(tensor: object) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.dtype in _DTYPES
    )


def _write(tensors: dict[str, torch.Tensor], target: int) -> Reply:
    header, at = {}, 0
    for name, tensor in tensors.items():
        offsets = [at, at + tensor.nbytes]
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = msgspec.json.encode(header)
    start = _LENGTH_BYTES + len(text)
    if start + at > os.fstat(target).st_size:
        return Refused(Why.TOO_LARGE)
    with mmap.mmap(target, start + at) as file:
        file[:start] = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        at = start
        for tensor in tensors.values():
            if tensor.nbytes:
                plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                file[at : at + tensor.nbytes] = plain.numpy().data
                at += tensor.nbytes
    return Unpickled(at)

"""Worker records to bytes and back, the same wherever discovery keeps them. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from trtllm_workers.types import WorkerRecord

FORMAT: Final = 1


class Unreadable(ValueError):
    """Bytes that hold no worker record of this release; says why."""


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """Which process keeps a record alive. ``machine`` is "" where it cannot be told."""

    host: str
    machine: str
    pid: int
    started: str


class RecordFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a file of a folder, or a key of etcd, holds."""

    format: int
    owner: Owner
    record: WorkerRecord


class _Format(msgspec.Struct):
    format: int


_encode = msgspec.json.Encoder().encode
_decode_format = msgspec.json.Decoder(_Format).decode
_decode = msgspec.json.Decoder(RecordFile).decode


def encode(record: WorkerRecord, owner: Owner) -> bytes:
    """Return what is kept of a record."""
    return _encode(RecordFile(format=FORMAT, owner=owner, record=record))


def decode(text: bytes) -> RecordFile:
    """Return what ``encode`` was given. Raises Unreadable: foreign bytes, or a newer format."""
    try:
        found = _decode_format(text).format
        if found != FORMAT:
            raise Unreadable(f"it has format {found}, this release reads format {FORMAT}")
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(str(error)) from error

"""Digests of content: 16 bytes of BLAKE3, by which equal images and embeddings are found again."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3

DIGEST_BYTES = 16


def digest(*parts: bytes | memoryview) -> bytes:
    """Return the digest of parts that cannot be mistaken for others: each counts with its length."""
    found = blake3()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest(length=DIGEST_BYTES)


def chunk_digest(pieces: Iterable[memoryview]) -> bytes:
    """Return the digest of one chunk of rows, which lies in pieces. Releases the interpreter."""
    found = blake3()
    for piece in pieces:
        found.update(piece)
    return found.digest()

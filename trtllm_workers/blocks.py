"""Tokens to chained block hashes: the only definition of "the same block". Knows no pool.

A block is ``block_size`` consecutive tokens. Its hash covers its own tokens and, through its
parent's hash, every token before it, so equal hashes mean equal prefixes: KV of one may be used
for the other. BLAKE2b with 16 bytes: a collision would put one user's text into another's answer,
so a short or non-cryptographic hash will not do.

Images stand in a prompt as equal placeholder tokens. What they show goes into the hashes of the blocks
that hold placeholders (``media_marks``), so prompts with different images share nothing from there on.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from struct import Struct

from trtllm_workers.types import MediaItem

HASH_BYTES = 16
TOKEN_TYPE = "I"  # unsigned 32-bit, native order; hashes are only compared between like machines

# Block index → what its hash covers besides tokens.
Marks = Mapping[int, bytes]
_NO_MARKS: Marks = {}
_MARK = Struct("<qqqqq")


def namespace(cache_salt: str, lora: str = "") -> str:
    """Return what separates a request's blocks from equal tokens of others: its salt and its adapter."""
    return f"{cache_salt}\0{lora}" if lora else cache_salt


def root_hash(model_id: str, cache_salt: str = "") -> bytes:
    """Return the parent of every first block of a model (and salt): other models never match."""
    return blake2b(f"{model_id}\0{cache_salt}".encode(), digest_size=HASH_BYTES).digest()


def media_marks(media: Sequence[MediaItem], block_size: int) -> Marks:
    """Return what the hashes of blocks with placeholder tokens must cover besides them.

    That is, for every image in a block: its digest, where in the block it begins (below 0: before), how
    long it is and its grid.
    """
    marks: dict[int, bytes] = {}
    for item in media:
        end = item.offset + item.num_tokens
        for index in range(item.offset // block_size, -(-end // block_size)):
            first = item.offset - index * block_size
            place = _MARK.pack(first, item.num_tokens, *(item.grid or (0, 0, 0)))
            marks[index] = marks.get(index, b"") + item.digest + place
    return marks


def block_hash(parent: bytes, tokens: Sequence[int], mark: bytes = b"") -> bytes:
    """Return the hash of one full block that follows ``parent``."""
    return blake2b(
        parent + array(TOKEN_TYPE, tokens).tobytes() + mark, digest_size=HASH_BYTES
    ).digest()


def block_hashes(
    tokens: Sequence[int], block_size: int, root: bytes, marks: Marks = _NO_MARKS
) -> list[bytes]:
    """Return the chained hashes of all full blocks of ``tokens``; a partial last block has none.

    Raises ValueError when ``block_size`` is not positive.
    """
    if block_size <= 0:
        raise ValueError(f"block_size must be positive, not {block_size}")
    packed = memoryview(array(TOKEN_TYPE, tokens).tobytes())
    step = block_size * array(TOKEN_TYPE).itemsize
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(packed) - step + 1, step):
        body = parent + packed[start : start + step]
        if marks:
            body += marks.get(len(hashes), b"")
        parent = blake2b(body, digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes

"""The memory behind the sim engine's block ids, and what stands in it for KV. Knows no request.

A block's bytes follow from the tokens and images it stands for, all before it, the model and the cache
salt. So blocks can really move between workers, and one that did not arrive is found out.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from hashlib import blake2b, shake_128

from trtllm_workers.blocks import Marks, block_hash
from trtllm_workers.errors import ConfigError
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.types import KvLayout

ORDER = "digest"
_NO_MARKS: Marks = {}

# Large blocks repeat themselves, for hashing megabytes would hold up the event loop. A prime, so that
# bytes shifted by pages or cache lines are still wrong ones.
_PERIOD_BYTES = 4099


def map_pool(layout: KvLayout, num_blocks: int) -> KvPool:
    """Return a pool of pages that the kernel provides when they are first touched.

    They are given back once nobody refers to the pool's memory. Raises ConfigError when the address
    space cannot be had.
    """
    size = num_blocks * layout.block_bytes
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{size:,} bytes for {num_blocks} blocks of {layout.block_bytes} bytes cannot be had: "
            f"{error}; lower kv_cache_config.max_tokens, or kv_block_bytes in the sim cost model",
            param="kv_cache_config.max_tokens",
        ) from error
    return KvPool(layout, num_blocks, memoryview(pages))


def prompt_digests(
    tokens: Sequence[int], block_size: int, root: bytes, marks: Marks = _NO_MARKS
) -> Iterator[bytes]:
    """Yield the chained hash of each block of a prompt, the last perhaps partly filled."""
    parent = root
    for index, start in enumerate(range(0, len(tokens), block_size)):
        parent = block_hash(parent, tokens[start : start + block_size], marks.get(index, b""))
        yield parent


def write_digests(pool: KvPool, blocks: Sequence[int], digests: Sequence[bytes]) -> None:
    """Fill each block with the bytes that its digest demands."""
    for block, digest in zip(blocks, digests, strict=True):
        pool.block(block)[:] = _content(pool, digest)


def find_wrong(pool: KvPool, blocks: Sequence[int], digests: Sequence[bytes]) -> dict[int, bytes]:
    """Return the blocks that hold other bytes than their digest demands, and a hash of those."""
    wrong: dict[int, bytes] = {}
    for block, digest in zip(blocks, digests, strict=True):
        found = bytes(pool.block(block))  # two bytes objects are compared at memory speed
        if found != _content(pool, digest):
            wrong[block] = blake2b(found, digest_size=len(digest)).digest()
    return wrong


def _content(pool: KvPool, digest: bytes) -> bytes:
    """Return the bytes of a block. No padding: a copy that stops early or is shifted must show."""
    size = pool.layout.block_bytes
    pattern = shake_128(digest).digest(min(size, _PERIOD_BYTES))
    return (pattern * -(-size // len(pattern)))[:size]

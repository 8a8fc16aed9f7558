"""The KV pool's memory: blocks of bytes, written and gathered by row. Knows no request and no hash.

One block is one contiguous run ``[layer, K and V, KV head, token, dim]``; the pool is an array of
blocks. So a block moves between processes as one piece, and every head of a gathered sequence is
one dense matrix, which the matrix kernels want. Behind the last block stands a block of zeros that
pads gathers.
"""

from __future__ import annotations

import contextlib
import mmap

import torch

from trtllm_workers.transfer.base import KvPool
from trtllm_workers.types import KvLayout

ORDER = "layer,kv,head,token,dim"


class KvMemory:
    """``num_blocks`` blocks on ``device``.

    On the CPU the memory is anonymous pages that the kernel zeroes when first touched: a large pool
    costs nothing at start-up.

    With tensor parallelism the ranks of a host share one such memory, ``pages``: a block has the heads
    of all of them, and this rank reads and writes ``num_own_heads`` from ``first_head`` on.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        first_head: int = 0,
        num_own_heads: int | None = None,
        pages: mmap.mmap | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.null_block = num_blocks
        self.num_kv_heads = num_kv_heads if num_own_heads is None else num_own_heads
        self.layer_stride = 2 * num_kv_heads  # rows of ``head_rows`` from a layer to the next
        self.head_dim = head_dim
        self.block_size = block_size
        self.heads_per_block = num_layers * 2 * num_kv_heads
        self.layout = layout_of(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=dtype,
        )
        num_bytes = (num_blocks + 1) * self.layout.block_bytes
        self._pages = pages
        if pages is None and device.type == "cpu":
            self._pages = _private_pages(num_bytes)
        if self._pages is None:
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        else:
            self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._by_block = self.bytes.view(num_blocks + 1, self.layout.block_bytes)
        flat = self.bytes.view(dtype)
        own = torch.arange(first_head, first_head + self.num_kv_heads)
        # Which row of a layer's are ours: [K or V, own head].
        self.own_rows = torch.arange(2).view(2, 1) * num_kv_heads + own
        # One row per (block, layer, K or V, head) and, finer, per token of it.
        self.head_rows = flat.view(-1, block_size * head_dim)
        self.token_rows = flat.view(-1, head_dim)

    def kv_pool(self) -> KvPool | None:
        """Return the blocks as transports see them, without the block of zeros.

        None on CUDA: transports move host memory only, and device memory is not exported.
        """
        if self._pages is None:
            return None
        size = self.num_blocks * self.layout.block_bytes
        return KvPool(self.layout, self.num_blocks, memoryview(self._pages)[:size])

    def export_block(self, block_id: int) -> memoryview:
        """Return the bytes of one block: a view of the pool on the CPU, a copy on CUDA.

        Valid while the block is held; the caller keeps the engine from stepping meanwhile.
        """
        self._check(block_id)
        return memoryview(self._by_block[block_id].cpu().numpy().data)

    def import_block(self, block_id: int, content: bytes | bytearray | memoryview) -> None:
        """Fill one block with bytes that a pool of equal layout exported."""
        self._check(block_id)
        if len(content) != self.layout.block_bytes:
            raise ValueError(
                f"block {block_id}: {len(content)} bytes given, "
                f"a block of this pool has {self.layout.block_bytes}"
            )
        source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self._by_block[block_id].copy_(source)

    def _check(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} is outside the pool of {self.num_blocks}")


def layout_of(
    *, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> KvLayout:
    """Return how a block lies in memory."""
    values = num_layers * 2 * num_kv_heads * block_size * head_dim
    return KvLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=str(dtype).removeprefix("torch."),
        order=ORDER,
        block_bytes=values * dtype.itemsize,
    )


def _private_pages(num_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer page faults and TLB misses when gathering; refused where the kernel has none.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

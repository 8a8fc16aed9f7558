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
    ) -> None:
        values = num_layers * 2 * num_kv_heads * block_size * head_dim
        self.num_blocks = num_blocks
        self.null_block = num_blocks
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.block_size = block_size
        self.heads_per_block = num_layers * 2 * num_kv_heads
        self.layout = KvLayout(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            dtype=str(dtype).removeprefix("torch."),
            order=ORDER,
            block_bytes=values * dtype.itemsize,
        )
        num_bytes = (num_blocks + 1) * self.layout.block_bytes
        self._pages = _pages(num_bytes) if device.type == "cpu" else None
        if self._pages is None:
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        else:
            self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8)
        self._by_block = self.bytes.view(num_blocks + 1, self.layout.block_bytes)
        flat = self.bytes.view(dtype)
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


def _pages(num_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Fewer page faults and TLB misses when gathering; refused where the kernel has none.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from trtllm_workers.transfer import prefault as prefault_module
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.prefault import prefault
from trtllm_workers.types import KvLayout

BLOCK_BYTES, NUM_BLOCKS = 1 << 16, 256


def pool_in(pages: mmap.mmap) -> KvPool:
    layout = KvLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        block_size=1,
        dtype="uint8",
        order="x",
        block_bytes=BLOCK_BYTES,
    )
    return KvPool(layout, NUM_BLOCKS, memoryview(pages)[: BLOCK_BYTES * NUM_BLOCKS])


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("advice", [23, 9999])  # an unknown advice is an older kernel's answer
def test_every_page_is_there_and_contents_stay(
    advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefault_module, "_POPULATE_WRITE", advice)
    pages = mmap.mmap(-1, BLOCK_BYTES * NUM_BLOCKS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages[5] = 77
    before = resident_bytes()
    assert prefault(pool_in(pages)) == BLOCK_BYTES * NUM_BLOCKS
    assert resident_bytes() - before > 0.9 * BLOCK_BYTES * NUM_BLOCKS
    assert pages[5] == 77
    assert pages[6] == 0


def test_a_pool_larger_than_it_should_take_gets_its_first_pages_only() -> None:
    pages = mmap.mmap(-1, BLOCK_BYTES * NUM_BLOCKS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = resident_bytes()
    assert prefault(pool_in(pages), 1 << 20) == 1 << 20
    assert resident_bytes() - before < 6 << 20

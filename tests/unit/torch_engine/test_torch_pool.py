"""The block allocator: counts add up, nothing is freed twice, events replay to the pool."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trtllm_workers.blocks import block_hashes, root_hash
from trtllm_workers.engines.torch.pool import BlockPool
from trtllm_workers.types import KvEventKind

NUM_BLOCKS = 12
ROOT = root_hash("model")


def hashes_of(which: int, count: int) -> list[bytes]:
    """Hashes of one of a few token streams; streams 0 and 1 share their first two blocks."""
    tokens = random.Random(which).choices(range(100), k=2 * count)
    tokens[:4] = [which // 2] * min(4, 2 * count)
    return block_hashes(tokens, 2, ROOT)


class PoolMachine(RuleBasedStateMachine):
    """Holders that match, allocate, store and release as sequences do."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[tuple[list[int], list[bytes], int]] = []
        self.replica: set[bytes] = set()

    @rule(which=st.integers(0, 5), count=st.integers(1, 5))
    def begin(self, which: int, count: int) -> None:
        hashes = hashes_of(which, count)
        cached = self.pool.match(hashes)
        room = self.pool.num_available - self.pool.num_cached_of(cached)
        if count - len(cached) > room:
            before = self.pool.num_available
            with pytest.raises(RuntimeError):
                self.pool.allocate(NUM_BLOCKS + 1)
            assert self.pool.num_available == before
            return
        self.pool.hold(cached)
        blocks = cached + self.pool.allocate(count - len(cached))
        assert len(set(blocks)) == count
        self.held.append((blocks, hashes, len(cached)))

    @precondition(lambda self: self.held)
    @rule(chance=st.randoms(use_true_random=False), count=st.integers(1, 5))
    def store(self, chance: random.Random, count: int) -> None:
        index = chance.randrange(len(self.held))
        blocks, hashes, stored = self.held[index]
        end = min(len(blocks), stored + count)
        full = blocks[:end]
        self.pool.store(full, hashes, stored)
        assert self.pool.match(hashes[:end]) == full
        self.held[index] = (full + blocks[end:], hashes, end)

    @precondition(lambda self: self.held)
    @rule(chance=st.randoms(use_true_random=False))
    def release(self, chance: random.Random) -> None:
        blocks, _hashes, _stored = self.held.pop(chance.randrange(len(self.held)))
        self.pool.release(blocks)

    @invariant()
    def counts_add_up(self) -> None:
        pool = self.pool
        assert pool.num_free + pool.num_cached + pool.num_active == NUM_BLOCKS
        assert pool.num_active == len({block for blocks, _h, _s in self.held for block in blocks})
        assert pool.num_available == pool.num_free + pool.num_cached

    @invariant()
    def events_replay_to_the_pool(self) -> None:
        for change in self.pool.take_changes():
            if change.kind is KvEventKind.REMOVED:
                assert self.replica >= set(change.hashes)
                self.replica -= set(change.hashes)
            else:
                assert change.parent is None or change.parent in self.replica
                assert not self.replica & set(change.hashes)
                self.replica |= set(change.hashes)
        assert self.replica == self.pool.hashes()

    @invariant()
    def held_blocks_keep_their_hashes(self) -> None:
        for blocks, hashes, stored in self.held:
            assert self.pool.match(hashes[:stored]) == blocks[:stored]


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_a_block_is_not_released_twice() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match=f"block {blocks[1]} released more often"):
        pool.release(blocks)
    assert pool.num_free == 4


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    pool = BlockPool(4)
    for which in (0, 2):
        blocks = pool.allocate(2)
        pool.store(blocks, hashes_of(which, 2), 0)
        pool.release(blocks)
    pool.hold(pool.match(hashes_of(0, 2)))  # used again: now the most recent
    pool.release(pool.match(hashes_of(0, 2)))
    pool.take_changes()
    pool.allocate(1)
    assert [change.hashes for change in pool.take_changes()] == [(hashes_of(2, 2)[1],)]
    assert len(pool.match(hashes_of(0, 2))) == 2
    assert len(pool.match(hashes_of(2, 2))) == 1


def test_without_reuse_nothing_is_stored() -> None:
    pool = BlockPool(4, reuse=False)
    blocks = pool.allocate(2)
    pool.store(blocks, hashes_of(0, 2), 0)
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached, pool.take_changes()) == (4, 0, [])

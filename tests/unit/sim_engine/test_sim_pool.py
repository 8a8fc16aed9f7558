from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)

from trtllm_workers.blocks import block_hashes, root_hash
from trtllm_workers.engines.sim import events as events_module
from trtllm_workers.engines.sim.pool import BlockPool
from trtllm_workers.types import KvEvent, KvEventKind

NUM_BLOCKS = 12
ROOT = root_hash("model")


def chain(*tokens: int) -> list[bytes]:
    return block_hashes(tokens, 1, ROOT)


class Holding:
    """A pretended stream: a chain it wants, how much of it is shared, and the blocks it holds."""

    def __init__(self, hashes: list[bytes], num_shared: int, blocks: list[int]) -> None:
        self.hashes = hashes
        self.num_shared = num_shared
        self.blocks = blocks


class PoolMachine(RuleBasedStateMachine):
    """Streams that hold, fill and release blocks in any order, beside a naive count."""

    streams = Bundle("streams")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.live: list[Holding] = []

    @rule(target=streams, tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def admit(self, tokens: list[int]) -> Holding:
        hashes = chain(*tokens)
        matched, cached = self.pool.match(hashes, len(hashes) - 1)
        needed = len(hashes) - matched
        if needed > self.pool.num_available - cached:
            return Holding(hashes, 0, [])
        blocks = self.pool.hold(hashes[:matched]) + self.pool.take(needed)
        holding = Holding(hashes, matched, blocks)
        self.live.append(holding)
        return holding

    @rule(stream=streams, count=st.integers(1, 4))
    def fill(self, stream: Holding, count: int) -> None:
        first = stream.num_shared
        count = min(count, len(stream.blocks) - first)
        if stream in self.live:
            self.pool.store(stream.hashes[: first + count], first, stream.blocks)
            stream.num_shared += count

    @rule(stream=consumes(streams))
    def release(self, stream: Holding) -> None:
        if stream in self.live:
            self.live.remove(stream)
            shared = stream.num_shared
            self.pool.release(stream.hashes[:shared], stream.blocks[shared:])

    @precondition(lambda self: len(self.live) > 2)
    @rule()
    def release_all(self) -> None:
        self.live.clear()
        self.pool.release_all()

    @invariant()
    def blocks_add_up(self) -> None:
        shared = {digest for s in self.live for digest in s.hashes[: s.num_shared]}
        private = [block for s in self.live for block in s.blocks[s.num_shared :]]
        assert self.pool.num_active == len(shared) + len(private)
        assert self.pool.num_free >= 0
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_active == NUM_BLOCKS

    @invariant()
    def what_streams_hold_was_allocated_and_not_freed(self) -> None:
        held = sum(len(s.blocks) for s in self.live)
        assert self.pool.num_allocated - self.pool.num_freed == held

    @invariant()
    def a_block_id_stands_for_one_block(self) -> None:
        by_hash = dict(self.pool._ids)
        for stream in self.live:
            for digest, block in zip(
                stream.hashes, stream.blocks[: stream.num_shared], strict=False
            ):
                assert by_hash[digest] == block
        private = [block for s in self.live for block in s.blocks[s.num_shared :]]
        in_use = [*by_hash.values(), *private]
        assert len(set(in_use)) == len(in_use) == NUM_BLOCKS - self.pool.num_free
        assert set(in_use) <= set(range(NUM_BLOCKS))

    @invariant()
    def held_blocks_are_here_and_every_parent_is(self) -> None:
        snapshot: set[bytes] = set()
        for hashes, parent in self.pool._runs():
            assert parent is None or parent in snapshot
            snapshot.update(hashes)
        assert len(snapshot) == self.pool.num_cached + len(self.pool._holders)
        for stream in self.live:
            assert set(stream.hashes[: stream.num_shared]) <= snapshot


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def stored(pool: BlockPool, hashes: list[bytes]) -> None:
    """Let a stream that is gone again have stored these blocks."""
    known, _ = pool.match(hashes, len(hashes))
    blocks = pool.hold(hashes[:known]) + pool.take(len(hashes) - known)
    pool.store(hashes, known, blocks)
    pool.release(hashes, ())


def test_eviction_takes_leaves_first_and_the_least_recently_used_first() -> None:
    pool = BlockPool(6)
    first, second = chain(1, 2, 3), chain(4, 5)
    stored(pool, first)
    stored(pool, second)
    pool.take(2)  # one free, one evicted
    assert pool.match(first, 3) == (2, 2)
    assert pool.match(second, 2) == (2, 2)
    stored(pool, first[:1])  # used again: its blocks outlive the second chain's
    pool.take(3)
    assert pool.match(first, 3) == (1, 1)
    assert pool.match(second, 2) == (0, 0)


def test_a_block_two_streams_fill_is_one_block() -> None:
    pool = BlockPool(4)
    hashes = chain(1, 2)
    first, second = pool.take(2), pool.take(2)
    pool.store(hashes, 0, first)
    pool.store(hashes, 0, second)
    assert first == second
    assert (pool.num_free, pool.num_active, pool.num_cached) == (2, 2, 0)
    pool.release(hashes, ())
    assert (pool.num_active, pool.num_cached) == (2, 0)
    pool.release(hashes, ())
    assert (pool.num_active, pool.num_cached) == (0, 2)


async def read(pool: BlockPool, count: int) -> list[KvEvent]:
    reader = pool.events.follow()
    found = []
    async with asyncio.timeout(5):
        async for event in reader:
            found.append(event)
            if len(found) == count:
                break
    await reader.aclose()  # type: ignore[attr-defined]  # it is an async generator
    return found


async def test_a_snapshot_groups_chains_and_names_their_parents() -> None:
    pool = BlockPool(8)
    trunk, branch = chain(1, 2, 3), chain(1, 2, 9)
    stored(pool, trunk)
    stored(pool, branch)
    cleared, first, second = await read(pool, 3)
    assert (cleared.kind, cleared.seq) == (KvEventKind.CLEARED, 2)
    assert (first.block_hashes, first.parent_hash, first.seq) == (tuple(trunk), None, 2)
    assert (second.block_hashes, second.parent_hash) == ((branch[2],), trunk[1])


async def test_a_reader_far_behind_gets_a_new_snapshot_instead_of_a_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events_module, "MAX_BACKLOG_EVENTS", 4)
    pool = BlockPool(64)
    reader = pool.events.follow()
    async with asyncio.timeout(5):
        assert (await anext(reader)).kind is KvEventKind.CLEARED
        for token in range(4):
            stored(pool, chain(token))
        assert (await anext(reader)).seq == 1
        for token in range(4, 10):
            stored(pool, chain(token))
        again = [await anext(reader) for _ in range(11)]
        assert again[0].kind is KvEventKind.CLEARED
        assert {event.seq for event in again} == {10}
        stored(pool, chain(99))
        assert (await anext(reader)).seq == 11
    await reader.aclose()  # type: ignore[attr-defined]  # it is an async generator
    assert not pool.events._backlogs

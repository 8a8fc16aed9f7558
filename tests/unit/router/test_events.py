"""Lost, repeated and reordered events end in a resync or in the right state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.router.support import (
    BLOCK,
    address,
    cleared,
    fill,
    hashes,
    open_pool,
    overlap,
    record,
    removed,
    send_to,
    stored,
)
from trtllm_workers.router.pool import Query
from trtllm_workers.types import KvEvent, KvEventKind

PROMPT = list(range(8 * BLOCK))
BLOCKS = hashes(PROMPT)
W0 = address("w0")


class Engine:
    """What an engine's event log tells, and what is true meanwhile."""

    def __init__(self) -> None:
        self.seq = 0
        self.held: set[bytes] = set()

    def change(self, kind: KvEventKind, blocks: list[bytes]) -> KvEvent:
        self.seq += 1
        if kind is KvEventKind.STORED:
            self.held |= set(blocks)
        elif kind is KvEventKind.REMOVED:
            self.held -= set(blocks)
        else:
            self.held.clear()
            blocks = []
        return KvEvent(seq=self.seq, kind=kind, block_hashes=tuple(blocks))

    def snapshot(self) -> list[KvEvent]:
        return [cleared(self.seq), *(stored(self.seq, [block]) for block in sorted(self.held))]

    @property
    def leading(self) -> int:
        count = 0
        for block in BLOCKS:
            if block not in self.held:
                break
            count += 1
        return min(count * BLOCK, len(PROMPT) - 1)


def changes_of(*kinds: KvEventKind) -> st.SearchStrategy[list[tuple[KvEventKind, list[bytes]]]]:
    some = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=8, unique=True)
    return st.lists(st.tuples(st.sampled_from([KvEventKind.STORED, *kinds]), some), max_size=15)


CHANGES = changes_of(KvEventKind.STORED, KvEventKind.REMOVED)
WITH_CLEARED = changes_of(KvEventKind.REMOVED, KvEventKind.CLEARED)


@given(WITH_CLEARED)
def test_events_in_order_give_the_right_overlap_at_every_point(
    changes: list[tuple[KvEventKind, list[bytes]]],
) -> None:
    pool, engine = open_pool(), Engine()
    for kind, blocks in changes:
        assert pool.apply(W0, [engine.change(kind, blocks)])
        assert overlap(pool, "w0", PROMPT) == engine.leading
        assert pool.num_blocks(W0) == len(engine.held)


@given(WITH_CLEARED, st.data())
def test_a_snapshot_heals_whatever_was_lost_repeated_or_reordered(
    changes: list[tuple[KvEventKind, list[bytes]]], data: st.DataObject
) -> None:
    pool, engine = open_pool(), Engine()
    events = [engine.change(kind, blocks) for kind, blocks in changes]
    came = data.draw(st.lists(st.sampled_from(events), max_size=20) if events else st.just([]))
    pool.apply(W0, came)
    assert pool.apply(W0, engine.snapshot())
    assert pool.has_snapshot(W0)
    assert overlap(pool, "w0", PROMPT) == engine.leading
    event = engine.change(KvEventKind.REMOVED, [BLOCKS[0]])
    assert pool.apply(W0, [event])
    assert overlap(pool, "w0", PROMPT) == 0


@given(CHANGES, st.data())
def test_lost_events_are_noticed_by_the_next_one(
    changes: list[tuple[KvEventKind, list[bytes]]], data: st.DataObject
) -> None:
    pool, engine = open_pool(), Engine()
    events = [engine.change(kind, blocks) for kind, blocks in changes]
    lost = data.draw(st.sets(st.sampled_from(range(len(events))))) if events else set()
    last = engine.change(KvEventKind.STORED, [BLOCKS[0]])
    came = [event for at, event in enumerate(events) if at not in lost] + [last]
    assert pool.apply(W0, came) is (not lost)
    assert pool.has_snapshot(W0) is (not lost)
    assert overlap(pool, "w0", PROMPT) == (0 if lost else engine.leading)


@given(CHANGES, st.data())
def test_repeated_events_change_nothing(
    changes: list[tuple[KvEventKind, list[bytes]]], data: st.DataObject
) -> None:
    pool, engine = open_pool(), Engine()
    events = []
    for kind, blocks in changes:
        events.append(engine.change(kind, blocks))
        assert pool.apply(W0, [events[-1]])
        assert pool.apply(W0, [data.draw(st.sampled_from(events))])
        assert overlap(pool, "w0", PROMPT) == engine.leading


def test_nothing_is_believed_between_a_gap_and_the_snapshot() -> None:
    pool = open_pool()
    assert pool.apply(W0, [stored(1, BLOCKS)])
    assert not pool.apply(W0, [stored(3, BLOCKS)])
    assert not pool.has_snapshot(W0)
    assert overlap(pool, "w0", PROMPT) == 0
    assert not pool.apply(W0, [stored(4, BLOCKS)])
    assert overlap(pool, "w0", PROMPT) == 0
    assert pool.apply(W0, [cleared(4), stored(4, BLOCKS[:2]), stored(4, BLOCKS[2:3])])
    assert overlap(pool, "w0", PROMPT) == 3 * BLOCK


def test_a_gap_ends_expectations_too_for_their_events_may_have_been_lost() -> None:
    pool = open_pool()
    send_to(pool, "w0", PROMPT)
    assert overlap(pool, "w0", PROMPT) == len(PROMPT) - 1
    assert not pool.apply(W0, [stored(2, [])])
    assert overlap(pool, "w0", PROMPT) == 0


def test_events_before_a_snapshot_ask_for_one() -> None:
    pool = open_pool(num_workers=0)
    pool.update([record("w0")])
    pool.set_open(W0, True)
    assert not pool.has_snapshot(W0)
    assert not pool.apply(W0, [stored(7, BLOCKS)])
    assert pool.apply(W0, [cleared(7)])
    assert pool.has_snapshot(W0)


def test_a_block_that_was_never_heard_of_may_be_removed() -> None:
    pool = open_pool()
    assert pool.apply(W0, [removed(1, BLOCKS[3:4]), stored(2, BLOCKS[:1])])
    assert overlap(pool, "w0", PROMPT) == BLOCK


def test_an_older_event_does_not_undo_a_younger_one() -> None:
    pool = open_pool()
    store, remove = stored(1, BLOCKS), removed(2, BLOCKS)
    assert pool.apply(W0, [store, remove, store])
    assert overlap(pool, "w0", PROMPT) == 0


def test_a_new_incarnation_holds_nothing_and_the_old_ones_events_mean_nothing() -> None:
    pool = open_pool()
    assert pool.apply(W0, [stored(1, BLOCKS)])
    again = record("w0", incarnation="2")
    fill(pool, [again, record("w1"), record("w2")])
    assert pool.apply(W0, [stored(2, BLOCKS)]), "of a worker that has left nothing is missing"
    choice = pool.place(query := Query(PROMPT), allowed=frozenset([again.address]))
    assert choice is not None
    assert choice.overlap_tokens == 0
    assert pool.place(query, allowed=frozenset([W0])) is None
    assert pool.num_blocks(W0) == 0

"""Where a worker keeps images: room, eviction, pins."""

from __future__ import annotations

import pytest

from trtllm_workers.errors import Overloaded
from trtllm_workers.transfer.media_store import Claim, Entry, MediaStore
from trtllm_workers.types import MediaItem

ROW = 8
BLOCK = 2 * ROW  # bytes


def make(num_blocks: int = 8) -> MediaStore:
    return MediaStore(
        num_blocks=num_blocks, rows_per_block=2, row_size=ROW // 4, dtype="float32", value_bytes=4
    )


def fill(claim: Claim, value: int) -> None:
    for run in claim.runs:
        run[:] = bytes([value]) * len(run)


def put(store: MediaStore, name: str, num_bytes: int, value: int = 1) -> Entry:
    claim = store.claim(num_bytes)
    fill(claim, value)
    item = MediaItem(digest(name), offset=0, num_tokens=num_bytes // ROW, num_bytes=num_bytes)
    return store.commit(claim, item)


def digest(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def content(store: MediaStore, entry: Entry) -> bytes:
    return b"".join(store.bytes_of(entry))


def test_what_is_put_is_found() -> None:
    store = make()
    entry = put(store, "a", 3 * ROW, value=7)
    assert store.pin(digest("a")) is entry
    assert content(store, entry) == b"\7" * 3 * ROW
    assert store.pin(digest("b")) is None


def test_a_pool_of_a_transport_sees_the_same_bytes() -> None:
    store = make()
    entry = put(store, "a", 2 * BLOCK, value=5)
    assert b"".join(store.pool.block(block) for block in entry.block_ids) == b"\5" * 2 * BLOCK
    assert store.pool.layout.block_bytes == BLOCK


def test_nobody_is_evicted_while_there_is_room() -> None:
    store = make(4)
    for name in "abcd":
        store.unpin(put(store, name, BLOCK))
    assert [store.pin(digest(name)) is not None for name in "abcd"] == [True] * 4


def test_the_least_recently_used_goes_first() -> None:
    store = make(3)
    for name in "abc":
        store.unpin(put(store, name, BLOCK))
    used = store.pin(digest("a"))
    assert used is not None
    store.unpin(used)
    put(store, "d", BLOCK)
    assert store.pin(digest("b")) is None
    assert store.pin(digest("a")) is not None


def test_pinned_items_stay_and_the_next_one_is_refused() -> None:
    store = make(2)
    entry = put(store, "a", 2 * BLOCK)
    with pytest.raises(Overloaded, match="try again"):
        store.claim(BLOCK)
    store.unpin(entry)
    put(store, "b", BLOCK)
    assert store.pin(digest("a")) is None


def test_what_never_fits_says_so() -> None:
    store = make(2)
    with pytest.raises(Overloaded, match="--media-cache-mb"):
        store.claim(3 * BLOCK)
    assert store.num_free_blocks == 2


def test_a_second_of_the_same_takes_no_room() -> None:
    store = make(4)
    first = put(store, "a", BLOCK)
    assert put(store, "a", BLOCK, value=9) is first
    assert first.num_pins == 2
    assert store.num_free_blocks == 3
    assert content(store, first) == b"\1" * BLOCK


def test_a_dropped_claim_leaves_nothing() -> None:
    store = make(4)
    claim = store.claim(3 * BLOCK)
    assert store.num_claimed_blocks == 3
    store.drop(claim)
    store.drop(claim)
    assert (store.num_free_blocks, store.num_claimed_blocks) == (4, 0)


def test_dropping_a_committed_claim_does_nothing() -> None:
    store = make(4)
    claim = store.claim(BLOCK)
    store.commit(claim, MediaItem(digest("a"), 0, 2, num_bytes=BLOCK))
    store.drop(claim)
    assert store.num_free_blocks == 3


def test_claims_are_in_one_piece_where_that_is_possible() -> None:
    store = make(6)
    entries = [put(store, name, BLOCK) for name in "abcdef"]
    for at in (0, 2, 3, 4):
        store.unpin(entries[at])
    assert len(store.claim(3 * BLOCK).runs) <= 2  # evicted one by one, so perhaps in two
    store = make(6)
    held = put(store, "x", BLOCK)
    claim = store.claim(3 * BLOCK)
    assert len(claim.runs) == 1
    store.drop(claim)
    store.unpin(held)


def test_room_in_pieces_is_used_too() -> None:
    store = make(4)
    entries = [put(store, name, BLOCK) for name in "abcd"]
    store.unpin(entries[0])
    store.unpin(entries[2])
    claim = store.claim(2 * BLOCK)
    assert [len(run) for run in claim.runs] == [BLOCK, BLOCK]


def test_letting_go_too_often_is_a_fault() -> None:
    store = make()
    entry = put(store, "a", ROW)
    store.unpin(entry)
    with pytest.raises(RuntimeError, match="more often"):
        store.unpin(entry)


def test_counts_add_up() -> None:
    store = make(8)
    kept = put(store, "a", BLOCK)
    store.unpin(put(store, "b", BLOCK))
    claim = store.claim(2 * BLOCK)
    assert (store.num_entries, store.num_pinned) == (2, 1)
    assert store.num_free_blocks + store.num_claimed_blocks + 2 == 8
    store.drop(claim)
    store.unpin(kept)
    assert store.num_pinned == 0

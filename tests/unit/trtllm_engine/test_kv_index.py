"""TensorRT-LLM's KV events: what they say of the prefix cache, and what they leave open."""

from __future__ import annotations

import itertools
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.blocks import block_hashes, root_hash
from trtllm_workers.engines.event_log import Change
from trtllm_workers.engines.trtllm.kv_index import KvIndex
from trtllm_workers.types import KvEventKind

SIZE = 4
WINDOW = 4096


def hashes(tokens: list[int], namespace: str = "") -> list[bytes]:
    return block_hashes(tokens, SIZE, root_hash("m", namespace))


class Source:
    """Numbers events as TensorRT-LLM does."""

    def __init__(self) -> None:
        self.index = KvIndex("m", SIZE)
        self._ids = itertools.count()

    def take(self, data: dict[str, Any], **envelope: Any) -> list[Change]:
        event = {"event_id": next(self._ids), "data": data, "window_size": WINDOW, **envelope}
        return self.index.take(event)

    def skip(self) -> None:
        next(self._ids)

    def store(
        self, tokens: list[int], names: list[int], parent: int | None = None, **envelope: Any
    ) -> list[Change]:
        blocks = [
            {
                "type": "stored_block",
                "block_hash": name,
                "cache_level": 0,
                "priority": 35,
                "tokens": [
                    {"type": "unique_token", "token_id": token, "token_extra_id": 0}
                    for token in tokens[at : at + SIZE]
                ],
            }
            for at, name in zip(range(0, len(tokens), SIZE), names, strict=True)
        ]
        data = {"type": "stored", "parent_hash": parent, "blocks": blocks}
        return self.take(data, **envelope)

    def remove(self, *names: int) -> list[Change]:
        return self.take({"type": "removed", "block_hashes": list(names)})


def stored(digest: bytes, parent: bytes | None = None) -> Change:
    return Change(KvEventKind.STORED, (digest,), parent)


def removed(digest: bytes) -> Change:
    return Change(KvEventKind.REMOVED, (digest,))


CLEARED = Change(KvEventKind.CLEARED)
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_chain_is_stored_extended_and_removed() -> None:
    source = Source()
    first, second = hashes(TOKENS)
    big = (1 << 63) + 9  # unsigned, beyond what a signed number holds
    assert source.take({"type": "created", "num_blocks_per_cache_level": [10, 0]}) == []
    assert source.store(TOKENS[:4], [big]) == [stored(first)]
    assert source.store(TOKENS[4:], [7], parent=big) == [stored(second, first)]
    assert source.index.cached_blocks([*TOKENS, 9], "") == 2
    assert source.remove(7, big) == [removed(second), removed(first)]
    assert source.index.cached_blocks([*TOKENS, 9], "") == 0


def test_a_signed_reader_s_hash_is_the_same_block() -> None:
    source = Source()
    big = (1 << 63) + 9
    source.store(TOKENS[:4], [big])
    assert source.remove(big - (1 << 64)) == [removed(hashes(TOKENS)[0])]


def test_the_last_token_of_a_prompt_is_never_cached() -> None:
    source = Source()
    source.store(TOKENS, [1, 2])
    assert source.index.cached_blocks(TOKENS, "") == 1


def test_partial_blocks_and_their_removal_are_left_out() -> None:
    source = Source()
    first, _ = hashes(TOKENS)
    assert source.store(TOKENS[:6], [1, 2]) == [stored(first)]
    assert source.index.counts.partial == 1
    assert source.remove(2) == []


def test_an_offload_to_the_host_is_no_removal() -> None:
    source = Source()
    source.store(TOKENS[:4], [1])
    level = {"type": "event_diff", "old_value": 0, "new_value": 1}
    data = {"type": "updated", "block_hash": 1, "cache_level": level, "priority": None}
    assert source.take(data) == []
    assert source.index.cached_blocks(TOKENS, "") == 1


def test_only_the_largest_window_counts() -> None:
    source = Source()
    assert source.store([9, 9, 9, 9], [5], window_size=512) == [stored(hashes([9] * 4)[0])]
    first = hashes(TOKENS)[0]
    assert source.store(TOKENS[:4], [1]) == [CLEARED, stored(first)]
    assert source.store([8, 8, 8, 8], [6], window_size=512) == []
    assert source.index.counts.other_windows == 1


def test_a_gap_clears_everything_and_what_follows_is_stored_anew() -> None:
    source = Source()
    first, _ = hashes(TOKENS)
    source.store(TOKENS, [1, 2])
    source.skip()
    assert source.store(TOKENS[:4], [1]) == [CLEARED, stored(first)]
    assert source.index.counts.resyncs == 1
    # The child of a block that was forgotten has nothing to hang on.
    assert source.store([1, 1, 1, 1], [8], parent=2) == []
    assert source.index.counts.orphans == 1


def test_each_rank_counts_its_events_and_holds_blocks_of_its_own() -> None:
    source = Source()
    first = hashes(TOKENS)[0]
    data = {
        "type": "stored",
        "parent_hash": None,
        "blocks": [{"block_hash": 1, "tokens": [{"token_id": one} for one in TOKENS[:4]]}],
    }
    gone = {"type": "removed", "block_hashes": [1]}

    def take(event_id: int, rank: int, what: dict[str, Any]) -> list[Change]:
        return source.take(what, event_id=event_id, attention_dp_rank=rank)

    assert take(1, 0, data) == [stored(first)]
    assert take(1, 1, data) == []  # the same number of another rank is no repetition
    assert take(2, 0, gone) == []  # the other rank still holds it
    assert take(2, 1, gone) == [removed(first)]
    assert source.index.counts.resyncs == 0


def test_unknown_events_are_counted_and_skipped() -> None:
    source = Source()
    assert source.take({"type": "defragmented"}) == []
    assert source.index.counts.unknown == 1


def test_salt_decides_whose_block_it_is() -> None:
    source = Source()
    source.index.note_request(TOKENS, "salt")
    assert source.store(TOKENS[:4], [1]) == [stored(hashes(TOKENS, "salt")[0])]
    assert source.index.cached_blocks(TOKENS, "") == 0
    assert source.index.cached_blocks(TOKENS, "salt") == 1


def test_equal_tokens_of_two_namespaces_are_told_apart_once_one_is_known() -> None:
    source = Source()
    source.index.note_request(TOKENS, "")
    assert source.store(TOKENS[:4], [1]) == [stored(hashes(TOKENS)[0])]
    source.index.note_request(TOKENS, "salt")
    assert source.store(TOKENS[:4], [2]) == [stored(hashes(TOKENS, "salt")[0])]
    source.remove(1, 2)
    assert source.store(TOKENS[:4], [1]) == [stored(hashes(TOKENS)[0])]  # known again by its hash


def test_a_block_that_two_namespaces_could_own_is_not_announced() -> None:
    source = Source()
    for namespace in ("", "salt"):
        source.index.note_request(TOKENS, namespace)
    assert source.store(TOKENS, [1, 2]) == []
    assert source.index.counts.ambiguous == 1
    assert source.remove(2, 1) == []


@given(seed=st.integers(0, 10_000))
def test_a_mirror_of_the_changes_equals_the_engine_s_cache(seed: int) -> None:
    """Random prefix trees of two namespaces, stored and removed, leaves first."""
    dice = random.Random(seed)
    source = Source()
    engine: dict[int, bytes] = {}  # what TensorRT-LLM holds: its hash → ours
    children: dict[int, set[int]] = {}
    mirror: set[bytes] = set()
    names: dict[bytes, int] = {}
    for _ in range(60):
        if engine and dice.random() < 0.4:
            leaf = dice.choice([name for name in engine if not children.get(name)])
            changes = source.remove(leaf)
            del engine[leaf]
            for left in children.values():
                left.discard(leaf)
        else:
            namespace = dice.choice(["", "salt"])
            # The two never share a first block, so each is certain whose it is.
            base = 0 if namespace else 50
            tokens = [base + dice.randrange(3) for _ in range(SIZE * dice.randrange(1, 4))]
            source.index.note_request(tokens, namespace)
            changes, parent = [], None
            for at, digest in enumerate(hashes(tokens, namespace)):
                name = names.setdefault(digest, dice.getrandbits(64))
                if name not in engine:
                    part = tokens[at * SIZE : (at + 1) * SIZE]
                    changes += source.store(part, [name], parent=parent)
                    engine[name] = digest
                    if parent is not None:
                        children.setdefault(parent, set()).add(name)
                parent = name
        for change in changes:
            if change.kind is KvEventKind.STORED:
                mirror.update(change.hashes)
            else:
                mirror.difference_update(change.hashes)
        assert mirror == set(engine.values())

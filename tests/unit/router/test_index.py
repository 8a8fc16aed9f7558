"""The index equals a dictionary of sets, whatever happens to it."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.router.support import BLOCK, hashes
from trtllm_workers.blocks import block_hashes, namespace, root_hash
from trtllm_workers.router.index import BlockIndex, match
from trtllm_workers.router.query import Query

BLOCKS = [bytes([number]) * 16 for number in range(12)]
SLOTS = st.sampled_from([0, 1, 2, 63, 64, 1000])
DEEDS = st.lists(
    st.tuples(
        st.sampled_from(["store", "remove", "clear"]),
        SLOTS,
        st.lists(st.sampled_from(BLOCKS), max_size=6),
    ),
    max_size=40,
)


@given(DEEDS)
def test_any_sequence_of_deeds_leaves_what_a_naive_model_holds(
    deeds: list[tuple[str, int, list[bytes]]],
) -> None:
    index, model = BlockIndex(), dict[int, set[bytes]]()
    for deed, slot, blocks in deeds:
        held = model.setdefault(slot, set())
        if deed == "store":
            index.store(slot, blocks)
            held |= set(blocks)
        elif deed == "remove":
            index.remove(slot, blocks)
            held -= set(blocks)
        else:
            index.clear(slot)
            held.clear()
    for slot, held in model.items():
        assert index.num_held(slot) == len(held)
        assert index.missing(slot, BLOCKS) == [block for block in BLOCKS if block not in held]
    expected = {
        block: sum(1 << slot for slot, held in model.items() if block in held)
        for block in BLOCKS
        if any(block in held for held in model.values())
    }
    assert index.holders == expected


TOKENS = st.lists(st.integers(0, 2), max_size=40)


@given(
    prompt=TOKENS,
    held=st.dictionaries(SLOTS, st.lists(TOKENS, max_size=3), max_size=5),
    expected=st.dictionaries(SLOTS, st.lists(TOKENS, max_size=2), max_size=5),
    holes=st.lists(st.tuples(SLOTS, TOKENS), max_size=3),
    among=st.sets(SLOTS),
    again=st.booleans(),
)
def test_a_match_tells_the_leading_blocks_of_each_worker_that_is_asked_about(
    prompt: list[int],
    held: dict[int, list[list[int]]],
    expected: dict[int, list[list[int]]],
    holes: list[tuple[int, list[int]]],
    among: set[int],
    again: bool,
) -> None:
    tables = (BlockIndex(), BlockIndex())
    for table, by_slot in zip(tables, (held, expected), strict=True):
        for slot, prompts in by_slot.items():
            for tokens in prompts:
                table.store(slot, hashes(tokens))
    for slot, tokens in holes:  # an engine may evict the middle of a prompt
        tables[0].remove(slot, hashes(tokens)[-1:])
    chain = Query(prompt).chain("model", BLOCK)
    bits = sum(1 << slot for slot in among)
    found = match(chain, *tables, bits)
    if again:  # a second pool asks with the hashes that are there already
        assert match(chain, *tables, bits) == found
    depths = {slot: depth for depth, group in found for slot in range(1001) if group >> slot & 1}
    assert len(depths) == sum(group.bit_count() for _, group in found), "a slot is in one group"

    def leading(slot: int) -> int:
        count = 0
        for block in hashes(prompt):
            if not any(table.holders.get(block, 0) >> slot & 1 for table in tables):
                break
            count += 1
        return count

    assert depths == {slot: leading(slot) for slot in among if leading(slot)}


@given(TOKENS, st.integers(1, 9), st.integers(0, 50), st.sampled_from([(0,), (0, 1)]))
def test_a_chain_has_the_hashes_of_blocks_py_however_far_it_was_matched(
    tokens: list[int], block_size: int, held: int, slots: tuple[int, ...]
) -> None:
    right = block_hashes(tokens, block_size, root_hash("model"))
    index = BlockIndex()
    for slot in slots:
        index.store(slot, right[:held])
    chain = Query(tokens).chain("model", block_size)
    match(chain, index, BlockIndex(), sum(1 << slot for slot in slots))
    assert len(chain.known) == min(len(right), held + 1), "no hash is made in vain"
    assert chain.all() == right


def test_a_salt_and_an_adapter_make_other_blocks() -> None:
    tokens = list(range(3 * BLOCK))
    asked = [("", ""), ("salt", ""), ("", "lora"), ("salt", "lora")]
    chains = [
        tuple(Query(tokens, cache_salt=salt, lora=lora).chain("model", BLOCK).all())
        for salt, lora in asked
    ]
    assert len(set(chains)) == len(asked)
    for (salt, lora), chain in zip(asked, chains, strict=True):
        root = root_hash("model", namespace(salt, lora))
        assert chain == tuple(block_hashes(tokens, BLOCK, root))


def test_two_pools_of_one_request_share_its_hashes() -> None:
    query = Query(list(range(100)))
    assert query.chain("model", BLOCK) is query.chain("model", BLOCK)
    assert query.chain("model", BLOCK) is not query.chain("model", 2 * BLOCK)


def test_a_thousand_workers_hold_what_they_stored() -> None:
    rng = random.Random(5)
    index = BlockIndex()
    prompt = hashes(list(range(20 * BLOCK)))
    depths = {slot: rng.randint(0, 20) for slot in range(1000)}
    for slot, depth in depths.items():
        index.store(slot, prompt[:depth])
    groups = match(
        Query(list(range(20 * BLOCK))).chain("model", BLOCK), index, BlockIndex(), (1 << 1000) - 1
    )
    for depth, group in groups:
        assert group == sum(1 << slot for slot, one in depths.items() if one == depth)

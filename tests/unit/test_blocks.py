from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.blocks import HASH_BYTES, block_hash, block_hashes, root_hash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=100)
SIZES = st.integers(1, 40)
ROOT = root_hash("model")


@given(TOKENS, SIZES)
def test_every_full_block_has_a_hash_and_a_partial_one_has_none(
    tokens: list[int], block_size: int
) -> None:
    hashes = block_hashes(tokens, block_size, ROOT)
    assert len(hashes) == len(tokens) // block_size
    assert len(set(hashes)) == len(hashes)
    assert {len(digest) for digest in hashes} <= {HASH_BYTES}


@given(TOKENS, SIZES)
def test_one_block_at_a_time_gives_the_same_chain(tokens: list[int], block_size: int) -> None:
    parent = ROOT
    for index, digest in enumerate(block_hashes(tokens, block_size, ROOT)):
        start = index * block_size
        assert block_hash(parent, tokens[start : start + block_size]) == digest
        parent = digest


@given(TOKENS, TOKENS, SIZES)
def test_hashes_agree_exactly_as_far_as_the_tokens_do(
    left: list[int], right: list[int], block_size: int
) -> None:
    ours, theirs = (block_hashes(tokens, block_size, ROOT) for tokens in (left, right))
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        end = (index + 1) * block_size
        assert (a == b) == (left[:end] == right[:end])


@given(TOKENS, st.integers(0, 99), st.integers(0, 2**32 - 1), SIZES)
def test_a_changed_token_changes_its_block_and_all_after_it(
    tokens: list[int], index: int, token: int, block_size: int
) -> None:
    if index >= len(tokens) or tokens[index] == token:
        return
    changed = [*tokens[:index], token, *tokens[index + 1 :]]
    first = index // block_size
    before, after = (block_hashes(each, block_size, ROOT) for each in (tokens, changed))
    assert before[:first] == after[:first]
    assert not set(before[first:]) & set(after[first:])


@given(TOKENS, SIZES)
def test_a_longer_sequence_only_adds_hashes(tokens: list[int], block_size: int) -> None:
    hashes = block_hashes(tokens, block_size, ROOT)
    assert block_hashes([*tokens, 1, 2, 3], block_size, ROOT)[: len(hashes)] == hashes


# NUL separates model and salt; no name of a model holds one.
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3)


@given(NAMES, st.text(max_size=3), NAMES, st.text(max_size=3))
def test_models_and_salts_never_share_a_root(
    model: str, salt: str, other_model: str, other_salt: str
) -> None:
    same = root_hash(model, salt) == root_hash(other_model, other_salt)
    assert same == ((model, salt) == (other_model, other_salt))


def test_hashes_are_the_same_in_every_process() -> None:
    assert root_hash("model").hex() == "b0207f3e0beb53266cff44e0fe595c6f"
    second = block_hashes([1, 2, 3, 4], 2, root_hash("model", "salt"))[1]
    assert second.hex() == "0aff1487aa5b052499430ef8ecb0eddc"


@pytest.mark.parametrize("block_size", [0, -1])
def test_an_impossible_block_size_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size must be positive"):
        block_hashes([1], block_size, ROOT)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_unsigned_32_bit_number_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes([token], 1, ROOT)

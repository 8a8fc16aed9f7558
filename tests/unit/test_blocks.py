from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.blocks import HASH_BYTES, block_hash, block_hashes, media_marks, root_hash
from trtllm_workers.types import MediaItem

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


def item(
    name: str, offset: int, num_tokens: int, grid: tuple[int, int, int] | None = None
) -> MediaItem:
    return MediaItem(name.encode().ljust(HASH_BYTES, b"\0"), offset, num_tokens, grid)


def hashes_with(*media: MediaItem, num_tokens: int = 40, block_size: int = 8) -> list[bytes]:
    return block_hashes([1] * num_tokens, block_size, ROOT, media_marks(media, block_size))


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 20))
def test_two_images_share_no_block_from_the_first_placeholder_on(
    offset: int, num_tokens: int, block_size: int
) -> None:
    size = 128
    cat, dog, text = (
        block_hashes([1] * size, block_size, ROOT, media_marks(media, block_size))
        for media in ([item("cat", offset, num_tokens)], [item("dog", offset, num_tokens)], [])
    )
    before = offset // block_size
    assert cat[:before] == dog[:before] == text[:before]
    later = [set(hashes[before:]) for hashes in (cat, dog, text)]
    assert len(set.union(*later)) == sum(map(len, later))


def test_equal_images_at_equal_places_share_all() -> None:
    assert hashes_with(item("cat", 5, 9)) == hashes_with(item("cat", 5, 9))


def test_place_length_grid_and_order_of_images_count() -> None:
    seen = [
        hashes_with(item("cat", 5, 9)),
        hashes_with(item("cat", 6, 9)),
        hashes_with(item("cat", 5, 10)),
        hashes_with(item("cat", 5, 9, (1, 3, 3))),
        hashes_with(item("cat", 5, 9, (1, 1, 9))),
        hashes_with(item("cat", 5, 4), item("dog", 9, 5)),
        hashes_with(item("dog", 5, 4), item("cat", 9, 5)),
    ]
    assert len({hashes[-1] for hashes in seen}) == len(seen)
    assert len({hashes[0] for hashes in seen}) == len(seen)


def test_an_image_that_begins_after_a_block_leaves_it_alone() -> None:
    assert hashes_with(item("cat", 16, 9))[:2] == hashes_with()[:2]


def test_one_block_at_a_time_gives_the_same_chain_with_images() -> None:
    marks = media_marks([item("cat", 5, 9), item("dog", 20, 3)], 8)
    parent = ROOT
    for index, digest in enumerate(block_hashes([1] * 40, 8, ROOT, marks)):
        assert block_hash(parent, [1] * 8, marks.get(index, b"")) == digest
        parent = digest

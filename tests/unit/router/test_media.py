"""Prompts with images are told apart by what the images show, as engines tell them apart."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.router.support import BLOCK, address, open_pool, stored
from trtllm_workers.blocks import block_hashes, media_marks, root_hash
from trtllm_workers.router.pool import Pool, Query
from trtllm_workers.types import MediaItem

IMAGE = 9
TEXT = [1, 2, 3, 4, 5, 6]
PROMPT = [*TEXT, *[IMAGE] * 10, 7, 8, 1, 2]


def item(shows: bytes = b"cat", offset: int = len(TEXT), **fields: Any) -> MediaItem:
    return MediaItem(shows.ljust(16, b"\0"), offset, 10, **fields)


def chain(tokens: list[int], *media: MediaItem) -> list[bytes]:
    return list(Query(tokens, media=media).chain("model", BLOCK).all())


def overlap(pool: Pool, *media: MediaItem) -> int:
    choice = pool.place(Query(PROMPT, media=media), allowed=frozenset([address("w1")]))
    assert choice is not None
    return choice.overlap_tokens


def test_hashes_are_those_of_the_engine() -> None:
    media = (item(),)
    expected = block_hashes(PROMPT, BLOCK, root_hash("model"), media_marks(media, BLOCK))
    assert chain(PROMPT, *media) == expected
    assert expected != block_hashes(PROMPT, BLOCK, root_hash("model"))
    both = Query(PROMPT, media=media)
    assert next(iter(both.chain("model", BLOCK))) == expected[0]
    assert list(both.chain("model", BLOCK)) == expected, "made in two goes"
    two = media_marks(media, 2)
    assert list(both.chain("model", 2).all()) == block_hashes(PROMPT, 2, root_hash("model"), two), (
        "blocks of another size"
    )


@pytest.mark.parametrize(
    "other", [item(b"dog"), item(offset=len(TEXT) - 1), item(grid=(1, 2, 5)), None]
)
def test_another_image_is_another_prefix_from_its_block_on(other: MediaItem | None) -> None:
    mine = chain(PROMPT, item())
    theirs = chain(PROMPT, *([] if other is None else [other]))
    assert mine[0] == theirs[0], "a block of text alone"
    assert not set(mine[1:]) & set(theirs[1:])


def test_a_worker_is_known_to_hold_what_was_shown() -> None:
    pool = open_pool()
    blocks = block_hashes(PROMPT, BLOCK, root_hash("model"), media_marks((item(),), BLOCK))
    pool.apply(address("w1"), [stored(1, blocks)])
    assert overlap(pool, item()) == len(PROMPT) - 1
    assert overlap(pool, item(b"dog")) == BLOCK
    assert overlap(pool) == BLOCK


def test_what_was_sent_is_expected_with_its_image() -> None:
    pool = open_pool(uses_events=False)
    query = Query(PROMPT, media=(item(),))
    choice = pool.place(query, allowed=frozenset([address("w1")]))
    assert choice is not None
    pool.charge(choice, query)
    assert overlap(pool, item()) == len(PROMPT) - 1
    assert overlap(pool, item(b"dog")) == BLOCK

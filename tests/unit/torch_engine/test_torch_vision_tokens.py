"""Greedy tokens of prompts with images are those of transformers, however they are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.unit.torch_engine.driver import prompt_of
from tests.unit.torch_engine.images import (
    FAMILIES,
    features,
    generate_without_cache,
    image_of,
    put_rows,
)
from tests.unit.torch_engine.seer import NUM_TOKENS, Seer

TALL, WIDE = image_of(1, 90, 40), image_of(2, 30, 100)
PROMPTS: dict[str, tuple[Any, ...]] = {
    "text_only": (prompt_of(0, 40),),
    "one_image": (TALL, prompt_of(1, 20)),
    "in_the_middle": (prompt_of(2, 33), WIDE, prompt_of(3, 50)),
    "two_images": (prompt_of(5, 10), TALL, prompt_of(6, 3), WIDE, prompt_of(7, 20)),
    "chat": (
        prompt_of(8, 10),
        WIDE,
        prompt_of(9, 30),
        TALL,
        prompt_of(10, 70),
        image_of(3, 64, 64),
        prompt_of(11, 5),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_are_those_of_transformers(
    family: str, name: str, seer: Callable[..., Seer]
) -> None:
    ours = seer(family)
    assert ours.ask(*PROMPTS[name]) == ours.theirs(*PROMPTS[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_end_with_an_image(family: str, seer: Callable[..., Seer]) -> None:
    ours = seer(family)
    prompt, media = ours.place(prompt_of(4, 20), TALL)
    theirs = generate_without_cache(ours.folder, prompt, [TALL], 8, ours.token)
    assert ours.driver.ask(prompt, 8, media=media) == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_depend_on_the_image(family: str, seer: Callable[..., Seer]) -> None:
    ours = seer(family)
    text = prompt_of(1, 20)
    answers = {tuple(ours.ask(image_of(seed), text)) for seed in range(4)}
    assert len(answers) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_a_file_are_as_good_as_the_image(
    family: str, seer: Callable[..., Seer]
) -> None:
    ours = seer(family)
    vision = ours.driver.core.loaded.vision
    assert vision is not None
    assert vision.encoder is not None
    rows, grid = features(ours.folder, TALL)
    checked = vision.encoder.check_grid(len(rows), grid)
    item = put_rows(vision.store, rows, checked)
    text = prompt_of(1, 20)
    assert ours.ask(text, item, text) == ours.theirs(text, TALL, text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", [7, 16, 33])
def test_tokens_do_not_depend_on_how_the_prompt_is_cut(
    family: str, step: int, seer: Callable[..., Seer]
) -> None:
    whole, cut = seer(family), seer(family, max_num_tokens=step)
    for name in ("two_images", "chat"):
        assert cut.ask(*PROMPTS[name]) == whole.ask(*PROMPTS[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_batch_mates(family: str, seer: Callable[..., Seer]) -> None:
    alone, together = seer(family), seer(family)
    keys = {}
    for name, parts in PROMPTS.items():
        prompt, media = together.place(*parts)
        keys[name] = together.driver.add(prompt, NUM_TOKENS, media=media)
    together.driver.finish()
    for name, key in keys.items():
        assert together.driver.tokens(key) == alone.ask(*PROMPTS[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_with_equal_images_is_taken_from_the_cache(
    family: str, seer: Callable[..., Seer]
) -> None:
    ours = seer(family)
    prompt, media = ours.place(prompt_of(0, 20), TALL, prompt_of(1, 40))
    first = ours.driver.ask(prompt, media=media)
    key = ours.driver.add(prompt, media=media)
    ours.driver.finish()
    assert ours.driver.tokens(key) == first
    assert ours.driver.chunks[key][0].cached_tokens == (len(prompt) - 1) // 16 * 16


@pytest.mark.parametrize("family", FAMILIES)
def test_another_image_shares_only_the_blocks_before_it(
    family: str, seer: Callable[..., Seer]
) -> None:
    ours, fresh = seer(family), seer(family, reuse=False)
    text, tail = prompt_of(0, 40), prompt_of(1, 40)
    ours.ask(text, image_of(1), tail)
    prompt, media = ours.place(text, image_of(2), tail)
    key = ours.driver.add(prompt, NUM_TOKENS, media=media)
    ours.driver.finish()
    assert ours.driver.chunks[key][0].cached_tokens == 32
    assert ours.driver.tokens(key) == fresh.ask(text, image_of(2), tail)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_equal_rows_in_another_grid_share_nothing(family: str, seer: Callable[..., Seer]) -> None:
    ours, fresh = seer(family), seer(family, reuse=False)
    item = ours.see(image_of(1, 32, 128))
    assert item.grid == (1, 2, 8)
    other = msgspec.structs.replace(item, grid=(1, 4, 4))
    assert fresh.see(image_of(1, 32, 128)) == item
    tail = prompt_of(1, 40)
    first = ours.ask(item, tail)
    prompt, media = ours.place(other, tail)
    key = ours.driver.add(prompt, NUM_TOKENS, media=media)
    ours.driver.finish()
    assert ours.driver.chunks[key][0].cached_tokens == 0
    assert ours.driver.tokens(key) == fresh.ask(other, tail) != first


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cached_beginning_may_end_within_an_image(family: str, seer: Callable[..., Seer]) -> None:
    ours, fresh = seer(family), seer(family, reuse=False)
    head = prompt_of(0, 9)
    prompt, media = ours.place(head, TALL)
    ours.driver.ask(prompt, 1, media=media)
    longer, media = ours.place(head, TALL, prompt_of(1, 30))
    key = ours.driver.add(longer, NUM_TOKENS, media=media)
    ours.driver.finish()
    cached = ours.driver.chunks[key][0].cached_tokens
    assert media[0].offset < cached < len(prompt)
    assert ours.driver.tokens(key) == fresh.ask(head, TALL, prompt_of(1, 30))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_cached_for_the_next_turn(family: str, seer: Callable[..., Seer]) -> None:
    # Blocks that hold the end of an image and generated tokens are hashed when they are full.
    ours, fresh = seer(family), seer(family, reuse=False)
    prompt, media = ours.place(prompt_of(0, 9), TALL)
    answer = ours.driver.ask(prompt, 60, media=media)
    assert ours.token not in answer
    turn = [*prompt, *answer, *prompt_of(1, 20)]
    key = ours.driver.add(turn, NUM_TOKENS, media=media)
    ours.driver.finish()
    assert ours.driver.chunks[key][0].cached_tokens >= len(prompt) + 32
    assert ours.driver.tokens(key) == fresh.ask(prompt_of(0, 9), TALL, answer + prompt_of(1, 20))

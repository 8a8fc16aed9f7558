"""Prompts with images under preemption and across handoffs give the tokens of one undisturbed engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.torch_engine.driver import prompt_of
from tests.unit.torch_engine.images import FAMILIES, image_of
from tests.unit.torch_engine.seer import Seer
from tests.unit.torch_engine.test_torch_handoff import hand_over, move

Make = Callable[..., Seer]

TALL, WIDE = image_of(1, 90, 40), image_of(2, 30, 100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reuse", [True, False])
def test_preemption_changes_no_token(family: str, reuse: bool, seer: Make) -> None:
    ample, tight = seer(family), seer(family, reuse=reuse, kv_cache_config__max_tokens=16 * 20)
    prompts = [(prompt_of(n, 10 + n), image_of(n, 64, 64), prompt_of(9, 20)) for n in range(6)]
    keys = []
    for parts in prompts:
        prompt, media = tight.place(*parts)
        keys.append(tight.driver.add(prompt, 60, media=media))
    tight.driver.finish()
    assert tight.driver.core.stats().preemptions > 0
    for key, parts in zip(keys, prompts, strict=True):
        assert tight.driver.tokens(key) == ample.ask(*parts, max_tokens=60)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_computed_elsewhere_goes_on_without_its_images(family: str, seer: Make) -> None:
    source, target, alone = (seer(family) for _ in range(3))
    parts = (prompt_of(0, 20), TALL, prompt_of(1, 5), WIDE, prompt_of(2, 9))
    prompt, media = source.place(*parts)
    chunks = hand_over(source.driver, target.driver, prompt, media=media)
    assert target.vision.store.num_entries == 0
    assert [token for chunk in chunks for token in chunk.token_ids] == alone.ask(*parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reuse", [True, False])
def test_it_may_even_be_preempted_there(family: str, reuse: bool, seer: Make) -> None:
    # Nothing could compute its prompt again: the images' rows are elsewhere.
    source, alone = seer(family), seer(family)
    target = seer(family, reuse=reuse, kv_cache_config__max_tokens=16 * 20)
    prompts = [(prompt_of(n, 10 + n), image_of(n, 64, 64), prompt_of(9, 8)) for n in range(5)]
    reserved = []
    for parts in prompts:
        prompt, media = source.place(*parts)
        prefill = source.driver.prefill(prompt, 70, media=media)
        key = target.driver.reserve(prompt, 70, media=media)
        source.driver.finish()
        while key not in target.driver.reservations:
            target.driver.step()
        target.driver.resume(key, move(source.driver, prefill, target.driver, key))
        reserved.append(key)
    target.driver.finish()
    assert target.driver.core.stats().preemptions > 0
    assert target.vision.store.num_entries == 0
    for key, parts in zip(reserved, prompts, strict=True):
        assert target.driver.tokens(key) == alone.ask(*parts, max_tokens=70)
    assert target.driver.core.pool.num_active == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reserved_prompt_can_be_computed_where_it_is_reserved(family: str, seer: Make) -> None:
    ours, alone = seer(family), seer(family)
    parts = (prompt_of(0, 20), TALL, prompt_of(1, 30))
    prompt, media = ours.place(*parts)
    key = ours.driver.reserve(prompt, 24, media=media)
    ours.driver.finish()
    ours.driver.resume(key, None)
    ours.driver.finish()
    assert ours.driver.tokens(key) == alone.ask(*parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reserved_prompt_can_be_prefilled_after_cached_blocks(family: str, seer: Make) -> None:
    ours, alone = seer(family), seer(family)
    parts = (prompt_of(0, 20), TALL, prompt_of(1, 30))
    prompt, media = ours.place(prompt_of(0, 20), TALL)
    ours.driver.ask(prompt, 1, media=media)  # cached up to somewhere in the image
    prompt, media = ours.place(*parts)
    key = ours.driver.reserve(prompt, 24, media=media)
    ours.driver.finish()
    num_cached = ours.driver.reservations[key].num_cached_blocks
    assert num_cached > 1
    ours.driver.core.prefill_reserved(
        key, num_cached, 0.0, ours.driver.rows(ours.driver.requests[key])
    )
    ours.driver.finish()
    assert list(ours.driver.prefilled[key].first.token_ids) == alone.ask(*parts)[:1]

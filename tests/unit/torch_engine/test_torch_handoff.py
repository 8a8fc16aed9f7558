"""A prompt computed in one engine and decoded in another gives the tokens of one engine alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.torch_engine.driver import Driver, prompt_of
from trtllm_workers.types import FinishReason, TokenChunk

Make = Callable[..., Driver]

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 11},
    "penalties": {
        "temperature": 0.8,
        "seed": 3,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
    },
    "logprobs": {"logprobs": 3},
    "bias_and_min_tokens": {"logit_bias": ((5, 4.0), (9, -2.0)), "min_tokens": 6},
}


def move(source: Driver, prefill: str, target: Driver, reserved: str) -> TokenChunk:
    """Copy what the reservation lacks, end the prefill, and return its first chunk."""
    made, wanted = source.prefilled[prefill], target.reservations[reserved]
    assert len(made.block_ids) == len(wanted.block_ids)
    ours, theirs = source.core.loaded.memory.kv_pool(), target.core.loaded.memory.kv_pool()
    assert ours is not None
    assert theirs is not None
    for index in range(wanted.num_cached_blocks, len(wanted.block_ids)):
        theirs.block(wanted.block_ids[index])[:] = ours.block(made.block_ids[index])
    source.core.release(prefill)
    return made.first


def hand_over(
    source: Driver, target: Driver, prompt: list[int], max_tokens: int = 24, **sampling: Any
) -> list[TokenChunk]:
    """Return the chunks of a disaggregated request."""
    prefill = source.prefill(prompt, max_tokens, **sampling)
    reserved = target.reserve(prompt, max_tokens, **sampling)
    source.finish()
    target.finish()
    target.resume(reserved, move(source, prefill, target, reserved))
    target.finish()
    for driver in (source, target):
        assert driver.core.pool.num_active == 0
        stats = driver.core.stats()
        assert stats.allocated_blocks == stats.freed_blocks
        assert stats.pinned_blocks == stats.reserved_blocks == 0
    return target.chunks[reserved]


def alone(driver: Driver, prompt: list[int], max_tokens: int = 24, **sampling: Any) -> list[Any]:
    key = driver.add(prompt, max_tokens, **sampling)
    driver.finish()
    return [(c.token_ids, c.logprobs, c.finish_reason) for c in driver.chunks[key]]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("family", ["llama", "llama_bfloat16", "mistral_window"])
def test_a_handed_over_stream_equals_one_computed_at_one_place(
    driver: Make, family: str, sampling: str
) -> None:
    options = SAMPLINGS[sampling]
    aggregated = driver(family, reuse=False)
    source = driver(family, max_num_tokens=48)  # in pieces
    target = driver(family)
    for index, length in enumerate((1, 15, 16, 17, 32, 100, 130)):
        prompt = prompt_of(index, length)
        expected = alone(aggregated, prompt, **options)
        chunks = hand_over(source, target, prompt, **options)
        assert [(c.token_ids, c.logprobs, c.finish_reason) for c in chunks] == expected, length


def test_prefixes_cached_on_either_side_change_no_token(driver: Make) -> None:
    prompt = prompt_of(4, 90)
    expected = [t for t, _l, _r in alone(driver(reuse=False), prompt)]
    source, target = driver(), driver()
    source.ask(prompt[:70])
    target.ask(prompt[:40])
    chunks = hand_over(source, target, prompt)
    assert [c.token_ids for c in chunks] == expected
    assert {c.cached_tokens for c in chunks} == {64}  # the prefill's, which computed the prompt
    again = hand_over(source, target, prompt)
    assert [c.token_ids for c in again] == expected
    assert target.core.stats().cached_prompt_tokens == 32 + 80


def test_blocks_brought_from_elsewhere_are_cached_once_resumed_and_not_before(driver: Make) -> None:
    source, target = driver(), driver()
    prompt = prompt_of(1, 70)
    prefill, reserved = source.prefill(prompt), target.reserve(prompt)
    source.finish()
    target.finish()
    assert target.core.pool.hashes() == set()
    first = move(source, prefill, target, reserved)
    target.resume(reserved, first)
    assert len(target.core.pool.hashes()) == 4
    target.finish()
    key = target.add(prompt, 12)
    target.finish()
    assert target.chunks[key][0].cached_tokens == 64
    assert target.tokens(key) == target.tokens(reserved)


def test_a_resumed_stream_that_is_preempted_gives_the_same_tokens(driver: Make) -> None:
    expected = [driver(reuse=False).ask(prompt_of(i, 17), 70) for i in range(6)]
    source = driver()
    target = driver(reuse=False, kv_cache_config__max_tokens=13 * 16)
    pairs = []
    for index in range(6):
        prompt = prompt_of(index, 17)
        pairs.append((source.prefill(prompt, 70), target.reserve(prompt, 70)))
    source.finish()
    moved: set[str] = set()
    for _ in range(3000):
        for prefill, reserved in pairs:
            if reserved in target.reservations and reserved not in moved:
                target.resume(reserved, move(source, prefill, target, reserved))
                moved.add(reserved)
        if target.core.is_idle:
            break
        target.step()
    assert [target.tokens(reserved) for _p, reserved in pairs] == expected
    assert target.core.stats().preemptions > 0
    assert target.core.pool.num_active == 0


def test_resuming_with_nothing_computes_what_is_not_cached(driver: Make) -> None:
    prompt = prompt_of(2, 75)
    drive = driver(max_num_tokens=32)
    expected = driver(reuse=False).ask(prompt)
    drive.ask(prompt[:40])
    key = drive.reserve(prompt)
    drive.finish()
    assert drive.reservations[key].num_cached_blocks == 2
    drive.resume(key, None)
    drive.finish()
    assert drive.tokens(key) == expected
    assert {c.cached_tokens for c in drive.chunks[key]} == {32}


def test_a_prefill_that_ends_with_its_first_token_pins_nothing(driver: Make) -> None:
    drive = driver()
    (token,) = drive.ask(prompt_of(3, 20), 1)
    by_length = drive.prefill(prompt_of(3, 20), 1)
    by_stop = drive.prefill(prompt_of(3, 20), 9, stop_token_ids=(token,))
    drive.finish()
    assert drive.prefilled[by_length].first.finish_reason is FinishReason.LENGTH
    assert drive.prefilled[by_stop].first.finish_reason is FinishReason.STOP
    assert drive.prefilled[by_stop].block_ids == ()
    assert drive.core.pool.num_active == 0
    assert drive.core.scheduler.pinned == []


def test_a_first_chunk_that_ends_the_stream_frees_the_reservation(driver: Make) -> None:
    drive = driver()
    key = drive.reserve(prompt_of(3, 40), 5)
    drive.finish()
    drive.resume(key, TokenChunk((4,), FinishReason.STOP))
    assert drive.core.is_idle
    assert drive.core.pool.num_active == 0
    assert drive.core.pool.hashes() == set()


def test_pinned_blocks_are_held_reported_and_cached_when_released(driver: Make) -> None:
    drive = driver(kv_cache_config__max_tokens=12 * 16)
    pinned = drive.prefill(prompt_of(0, 60), 8)
    drive.finish()
    made = drive.prefilled[pinned]
    assert made.num_tokens == 60
    assert len(made.block_ids) == 4  # none beside for decoding
    assert made.queue_s >= 0
    assert made.compute_s > 0
    pool = drive.core.loaded.memory.kv_pool()
    assert pool is not None
    before = [bytes(pool.block(block)) for block in made.block_ids]
    for seed in range(1, 6):
        drive.ask(prompt_of(seed, 100), 12)  # fills the rest of the pool again and again
    assert [bytes(pool.block(block)) for block in made.block_ids] == before
    stats = drive.core.stats()
    assert (stats.pinned_blocks, stats.active_blocks) == (4, 4)
    assert stats.allocated_blocks - stats.freed_blocks == 4
    assert drive.core.holdings() == {pinned: 4}
    drive.core.release(pinned)
    drive.core.release(pinned)
    stats = drive.core.stats()
    assert (stats.pinned_blocks, stats.active_blocks) == (0, 0)
    assert stats.allocated_blocks == stats.freed_blocks
    assert drive.core.holdings() == {}
    again = drive.add(prompt_of(0, 60), 2)
    drive.finish()
    assert drive.chunks[again][0].cached_tokens == 48


def test_the_pool_is_one_writable_view_of_all_blocks(driver: Make) -> None:
    core = driver().core
    pool, layout = core.loaded.memory.kv_pool(), core.loaded.info.layout
    assert pool is not None
    assert layout is not None
    assert pool.layout == layout
    assert pool.num_blocks == core.loaded.info.num_blocks
    assert (pool.memory.format, pool.memory.readonly) == ("B", False)
    assert pool.memory.nbytes == pool.num_blocks * layout.block_bytes
    assert layout.block_bytes == 2 * 2 * 2 * 16 * 16 * 4
    pool.block(3)[:4] = b"abcd"
    assert bytes(core.loaded.memory.export_block(3)[:4]) == b"abcd"

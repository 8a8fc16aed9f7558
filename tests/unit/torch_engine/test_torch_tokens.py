"""Greedy and seeded tokens depend on prompt and model alone, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.torch_engine.conftest import FAMILIES
from tests.unit.torch_engine.driver import Driver, prompt_of
from trtllm_workers.blocks import block_hashes, root_hash

LENGTHS = (1, 5, 15, 16, 17, 50, 97, 300)
OUTPUT = 24
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}


def alone(driver: Driver, **sampling: Any) -> list[list[int]]:
    return [driver.ask(prompt_of(i, n), OUTPUT, **sampling) for i, n in enumerate(LENGTHS)]


def together(driver: Driver, **sampling: Any) -> list[list[int]]:
    """Ask all subjects at once, among mates that come, go and sample otherwise."""
    for index in range(4):
        driver.add(
            prompt_of(100 + index, 3 + 40 * index), 4 + 5 * index, temperature=1.0, seed=index
        )
    driver.step()
    keys = [driver.add(prompt_of(i, n), OUTPUT, **sampling) for i, n in enumerate(LENGTHS)]
    for index in range(4):
        driver.add(prompt_of(200 + index, 70), 9, temperature=float(index % 2), seed=index)
    driver.finish()
    return [driver.tokens(key) for key in keys]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_tokens_are_the_same_alone_in_a_batch_chunked_and_cached(
    driver: Callable[..., Driver], family: str
) -> None:
    fresh = driver(family, reuse=False)
    assert fresh.core.loaded.deterministic
    for sampling in ({}, SAMPLED):
        expected = alone(fresh, **sampling)
        assert len({tuple(tokens) for tokens in expected}) == len(LENGTHS)
        batched = driver(family)
        assert together(batched, **sampling) == expected
        assert alone(batched, **sampling) == expected  # from cached prefixes
        assert batched.core.stats().cached_prompt_tokens > 300
        for max_num_tokens in (16, 50):
            chunked = driver(family, max_num_tokens=max_num_tokens, max_batch_size=16)
            assert together(chunked, **sampling) == expected


def test_tokens_are_the_same_after_preemption(driver: Callable[..., Driver], family: str) -> None:
    expected = [driver(family, reuse=False).ask(prompt_of(i, 17), 70) for i in range(8)]
    for reuse in (True, False):
        # Eight that grow from 2 to 6 blocks in a pool of 14.
        tight = driver(family, reuse=reuse, kv_cache_config__max_tokens=14 * 16)
        keys = [tight.add(prompt_of(i, 17), 70) for i in range(8)]
        tight.finish()
        assert [tight.tokens(key) for key in keys] == expected
        assert tight.core.stats().preemptions > 0
        assert tight.core.pool.num_active == 0


@pytest.mark.parametrize("block_size", [8, 32, 64, 128, 256])
def test_tokens_do_not_depend_on_the_block_size(
    driver: Callable[..., Driver], block_size: int
) -> None:
    expected = alone(driver(reuse=False))
    other = driver(kv_cache_config__tokens_per_block=block_size)
    assert together(other) == expected
    assert alone(other) == expected


@pytest.mark.parametrize("family", ["llama", "llama_bfloat16", "mistral_window"])
def test_a_prefix_moved_to_another_pool_gives_the_same_tokens(
    driver: Callable[..., Driver], family: str
) -> None:
    source, target = driver(family), driver(family)
    target.ask(prompt_of(9, 40))  # so that block ids differ
    prompt = prompt_of(1, 100)
    expected = source.ask(prompt, 20)
    info = source.core.loaded.info
    hashes = block_hashes(prompt, info.block_size, root_hash(info.model_id))
    from_blocks = source.core.pool.match(hashes)
    assert len(from_blocks) == 6
    to_blocks = target.core.pool.allocate(len(hashes))
    assert to_blocks != from_blocks
    for mine, theirs in zip(to_blocks, from_blocks, strict=True):
        content = source.core.loaded.memory.export_block(theirs)
        assert content.nbytes == info.layout.block_bytes  # type: ignore[union-attr]
        target.core.loaded.memory.import_block(mine, content)
        assert target.core.loaded.memory.export_block(mine) == content
    target.core.pool.store(to_blocks, hashes, 0)
    target.core.pool.release(to_blocks)
    key = target.add(prompt, 20)
    target.finish()
    assert target.tokens(key) == expected
    assert target.chunks[key][0].cached_tokens == 96


def test_a_block_refuses_bytes_of_another_size_and_ids_outside_the_pool(
    driver: Callable[..., Driver],
) -> None:
    memory = driver().core.loaded.memory
    with pytest.raises(ValueError, match=r"block 0: 3 bytes given"):
        memory.import_block(0, b"abc")
    with pytest.raises(IndexError, match="outside the pool"):
        memory.export_block(memory.null_block)


def test_answers_to_one_prompt_share_its_prefill(driver: Callable[..., Driver]) -> None:
    drive = driver(max_num_tokens=64)
    prompt = prompt_of(0, 160)
    keys = [drive.add(prompt, 6, temperature=1.0, seed=seed) for seed in range(4)]
    drive.finish()
    assert [drive.chunks[key][0].cached_tokens for key in keys] == [0, 144, 144, 144]
    assert len({tuple(drive.tokens(key)) for key in keys}) == 4
    assert drive.core.stats().cached_prompt_tokens == 3 * 144
    assert drive.core.pool.num_active == 0


def test_logits_that_are_no_numbers_end_that_request_alone(driver: Callable[..., Driver]) -> None:
    drive = driver()
    expected = drive.ask(prompt_of(1, 20), 8)
    embedding = drive.core.loaded.model._embedding
    broken = drive.add([5, 6, 7], 8)
    good = drive.add([t for t in prompt_of(1, 20) if t != 6], 8)
    before = embedding[6].clone()
    embedding[6] = float("nan")
    drive.finish()
    embedding[6] = before
    chunk = drive.chunks[broken][-1]
    assert (chunk.finish_reason, chunk.error_code) == ("error", "engine_error")
    assert "no token can be chosen" in (chunk.error_message or "")
    assert len(drive.tokens(good)) == 8
    assert drive.ask(prompt_of(1, 20), 8) == expected

"""The engine contract, part 3: which tokens come out. Runs on every engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.contract.engines import BLOCK_SIZE, SMALL_POOL, VOCAB_SIZE
from tests.contract.harness import DEADLINE_S, Harness, ask, prompt_of, tokens_of
from trtllm_workers.engines.base import Engine
from trtllm_workers.types import FinishReason

# The subjects: less than a block, a block's border and its neighbours, several blocks and chunks.
LENGTHS = (1, 5, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 50, 97)
OUTPUT = 24
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 11}


async def alone(engine: Engine, **sampling: Any) -> list[list[int]]:
    """Return the answers to every subject, asked one after the other."""
    return [
        await tokens_of(engine, prompt_of(i, length), OUTPUT, **sampling)
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(params=[{}, SAMPLED], ids=["greedy", "seeded"])
def sampling(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.fixture(scope="session")
def known_answers() -> dict[tuple[str, bool], list[list[int]]]:
    """Answers computed so far, by engine and whether they are seeded."""
    return {}


@pytest.fixture
async def expected(
    harness: Harness,
    sampling: dict[str, Any],
    known_answers: dict[tuple[str, bool], list[list[int]]],
) -> list[list[int]]:
    """Answers of an engine that reuses nothing, computes each prompt at once and has one request."""
    key = (harness.kind.model, bool(sampling))
    if key not in known_answers:
        engine = await harness.start(
            kv_cache_config__enable_block_reuse=False, kv_cache_config__max_tokens=4096
        )
        known_answers[key] = await alone(engine, **sampling)
    return known_answers[key]


@pytest.mark.parametrize("pool_tokens", [4096, SMALL_POOL])
async def test_tokens_do_not_depend_on_batch_mates(
    harness: Harness, sampling: dict[str, Any], expected: list[list[int]], pool_tokens: int
) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=pool_tokens)
    mates = [
        ask(engine, prompt_of(100 + i, 3 + 7 * i), 10 + 3 * i, temperature=i % 2, seed=i)
        for i in range(16)
    ]
    await mates[3].reaches(2)
    answers = [
        ask(engine, prompt_of(i, length), OUTPUT, **sampling) for i, length in enumerate(LENGTHS)
    ]
    assert [(await answer.end()).tokens for answer in answers] == expected
    for mate in mates:
        await mate.end()


@pytest.mark.parametrize("max_num_tokens", [1, 7, 33])
async def test_tokens_do_not_depend_on_chunking(
    harness: Harness,
    sampling: dict[str, Any],
    expected: list[list[int]],
    max_num_tokens: int,
) -> None:
    engine = await harness.start(
        max_num_tokens=max_num_tokens, max_batch_size=min(4, max_num_tokens)
    )
    assert await alone(engine, **sampling) == expected


async def test_tokens_do_not_depend_on_prefix_reuse(
    harness: Harness, sampling: dict[str, Any], expected: list[list[int]]
) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4096)
    assert await alone(engine, **sampling) == expected
    for index, length in enumerate(LENGTHS):
        answer = await ask(engine, prompt_of(index, length), OUTPUT, **sampling).end()
        assert answer.tokens == expected[index]
        assert answer.cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE


async def test_an_answer_goes_on_from_a_prompt_that_holds_its_beginning(
    harness: Harness,
) -> None:
    engine = await harness.start()
    for index, tokens in enumerate(await alone(engine)):
        prompt = prompt_of(index, LENGTHS[index]) + tokens[:10]
        assert await tokens_of(engine, prompt, OUTPUT - 10) == tokens[10:]


async def test_tokens_do_not_depend_on_preemption(
    harness: Harness, sampling: dict[str, Any], expected: list[list[int]]
) -> None:
    # Ten blocks: the longest subject alone needs eight, so most of them cannot run together.
    engine = await harness.start(kv_cache_config__max_tokens=10 * BLOCK_SIZE)
    for _ in range(2):  # the second time with whatever is cached
        answers = [
            ask(engine, prompt_of(i, length), OUTPUT, **sampling)
            for i, length in enumerate(LENGTHS)
        ]
        assert [(await answer.end()).tokens for answer in answers] == expected
    assert harness.kind.figures_lag or engine.stats().preemptions > 0
    assert engine.stats().active_blocks == 0


async def test_tokens_do_not_depend_on_the_engine_s_life(
    harness: Harness, sampling: dict[str, Any], expected: list[list[int]]
) -> None:
    assert await alone(await harness.start(), **sampling) == expected


async def test_other_prompts_and_other_seeds_give_other_tokens(harness: Harness) -> None:
    engine = await harness.start()
    greedy = [await tokens_of(engine, prompt_of(i, 20), OUTPUT) for i in range(4)]
    seeded = [
        await tokens_of(engine, prompt_of(0, 20), OUTPUT, temperature=1.0, seed=seed)
        for seed in range(4)
    ]
    drawn = [
        await tokens_of(engine, prompt_of(0, 20), OUTPUT, temperature=1.0, seed=None)
        for _ in range(4)
    ]
    assert len({tuple(tokens) for tokens in (*greedy, *seeded, *drawn)}) == 12


async def test_a_seed_changes_nothing_when_greedy(harness: Harness) -> None:
    engine = await harness.start()
    prompt = prompt_of(0, 20)
    assert await tokens_of(engine, prompt, seed=1) == await tokens_of(engine, prompt, seed=2)


async def test_a_cache_salt_changes_no_token(harness: Harness) -> None:
    engine = await harness.start()
    prompt = prompt_of(0, 50)
    assert await tokens_of(engine, prompt) == await tokens_of(engine, prompt, cache_salt="mine")


# --- stop ids, eos, min_tokens -----------------------------------------------------------------


async def test_a_stop_id_ends_the_stream_and_is_hidden(harness: Harness) -> None:
    engine = await harness.start()
    prompt = prompt_of(0, 20)
    full = await tokens_of(engine, prompt, OUTPUT)
    stop = full[OUTPUT // 2]
    first = full.index(stop)
    answer = await ask(engine, prompt, OUTPUT, stop_token_ids=(stop,)).end()
    assert answer.tokens == full[:first]
    assert answer.finish_reason is FinishReason.STOP
    assert answer.last.stop_token_id == stop
    assert answer.last.num_hidden_tokens == 1
    assert sum(chunk.num_hidden_tokens for chunk in answer.chunks) == 1


async def test_a_stop_id_as_the_first_token_leaves_an_empty_answer(harness: Harness) -> None:
    engine = await harness.start()
    prompt = prompt_of(0, 20)
    first = (await tokens_of(engine, prompt, 1))[0]
    answer = await ask(engine, prompt, OUTPUT, stop_token_ids=(first,)).end()
    assert (answer.tokens, len(answer.chunks)) == ([], 1)
    assert answer.finish_reason is FinishReason.STOP


async def test_min_tokens_keeps_stop_ids_from_being_sampled(harness: Harness) -> None:
    engine = await harness.start()
    prompt = prompt_of(0, 20)
    full = await tokens_of(engine, prompt, OUTPUT)
    stops = tuple(dict.fromkeys(full[:6]))
    answer = await ask(engine, prompt, OUTPUT, stop_token_ids=stops, min_tokens=10).end()
    assert len(answer.tokens) >= 10
    assert not set(stops) & set(answer.tokens)


async def test_eos_ends_a_stream_unless_ignored(harness: Harness, tmp_path: Path) -> None:
    eos = list(range(0, VOCAB_SIZE, 2))
    folder = tmp_path / "eos" / "model"
    harness.kind.write_checkpoint(folder, eos)
    engine = harness.build(folder, often_eos=True)
    async with asyncio.timeout(DEADLINE_S):
        info = await engine.start()
    assert info.eos_token_ids == tuple(eos)
    answers = [
        await ask(engine, prompt_of(i, 10), 100, temperature=1.0, seed=i, ignore_eos=False).end()
        for i in range(10)
    ]
    for answer in answers:
        assert answer.finish_reason is FinishReason.STOP
        assert answer.last.stop_token_id in eos
        assert answer.last.num_hidden_tokens == 1
        assert not set(eos) & set(answer.tokens)
    late = await ask(
        engine, prompt_of(0, 10), 100, temperature=1.0, seed=0, ignore_eos=False, min_tokens=50
    ).end()
    assert 50 <= len(late.tokens) < 100
    ignoring = await ask(engine, prompt_of(0, 10), 100, temperature=1.0, seed=0).end()
    assert (len(ignoring.tokens), ignoring.finish_reason) == (100, FinishReason.LENGTH)

"""The engine contract, part 1: life, submission, streams, death. Runs on every engine.

Aborts are in test_engine_abort.py, tokens in test_engine_tokens.py, the pool, the prefix cache and
KV events in test_engine_blocks.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from pathlib import Path

import pytest

from tests.contract.engines import BLOCK_SIZE, SETTINGS, VOCAB_SIZE
from tests.contract.harness import (
    DEADLINE_S,
    Answer,
    Follower,
    Harness,
    ask,
    prompt_of,
    request_of,
    tokens_of,
)
from trtllm_workers.engines.base import generate
from trtllm_workers.errors import ConfigError, ContextTooLong, EngineDead, RequestError
from trtllm_workers.types import EngineStats, FinishReason, SamplingParams, TokenChunk

# Every sampling field an engine may decline, with a value that is not its default.
OPTIONAL_FIELDS = {
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logprobs": 1,
    "logit_bias": ((5, 1.0),),
}


# --- start -------------------------------------------------------------------------------------


async def test_start_tells_what_the_engine_is_and_submit_works_at_once(harness: Harness) -> None:
    engine, info = await harness.start_with_info()
    answer = ask(engine, prompt_of(0, 5), 3)
    assert info.engine == harness.kind.engine
    assert info.model_path == str(harness.model_path)
    assert info.model_id
    assert info.block_size == BLOCK_SIZE
    assert (
        info.num_blocks * BLOCK_SIZE
        <= {**SETTINGS, **harness.kind.settings}["kv_cache_config__max_tokens"]
    )
    assert (info.max_seq_len, info.max_batch_size, info.max_num_tokens) == (256, 32, 512)
    assert info.vocab_size == VOCAB_SIZE
    assert info.eos_token_ids == (1,)
    assert {"max_tokens", "temperature", "seed", "stop_token_ids"} <= set(info.capabilities)
    assert set(info.capabilities) <= set(SamplingParams.__struct_fields__)
    assert len((await answer.end()).tokens) == 3


async def test_start_names_the_missing_model_folder(harness: Harness, tmp_path: Path) -> None:
    engine = harness.build(tmp_path / "no such model")
    with pytest.raises(ConfigError, match="no such model"):
        await engine.start()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"vocab_size": "many"}'])
async def test_start_names_the_broken_config_file(
    harness: Harness, tmp_path: Path, text: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(harness.model_path, folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        await harness.build(folder).start()


async def test_start_names_the_key_of_a_pool_too_small_for_a_block(harness: Harness) -> None:
    engine = harness.build(kv_cache_config__max_tokens=BLOCK_SIZE - 1)
    with pytest.raises(ConfigError, match=r"kv_cache_config\.max_tokens"):
        await engine.start()


async def test_a_model_may_have_its_eos_in_a_list(harness: Harness, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(harness.model_path, folder)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**config, "eos_token_id": [7, 9]}))
    engine = harness.build(folder)
    assert (await engine.start()).eos_token_ids == (7, 9)


# --- submit and deliver ------------------------------------------------------------------------


async def test_submit_delivers_later_and_on_the_loop(harness: Harness) -> None:
    engine = await harness.start()
    request = request_of(prompt_of(0, 20), 4)
    answer = Answer(request)
    threads: set[int] = set()
    inside_submit = True
    delivered_inside = False

    def deliver(chunk: TokenChunk) -> None:
        nonlocal delivered_inside
        delivered_inside |= inside_submit
        threads.add(threading.get_ident())
        answer.deliver(chunk)

    engine.submit(request, deliver)
    inside_submit = False
    await answer.end()
    assert not delivered_inside
    assert threads == {threading.get_ident()}


async def test_all_chunks_of_a_step_come_in_one_iteration(harness: Harness) -> None:
    engine = await harness.start(kv_cache_config__max_tokens=4096)
    loop = asyncio.get_running_loop()
    iteration = 0
    ticking: asyncio.Handle

    def tick() -> None:
        nonlocal iteration, ticking
        iteration += 1
        ticking = loop.call_soon(tick)

    ticking = loop.call_soon(tick)
    seen: dict[int, list[int]] = {}
    requests = [request_of(prompt_of(i, 10 + i), 30) for i in range(8)]
    answers = [Answer(request) for request in requests]
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):

        def deliver(chunk: TokenChunk, index: int = index, answer: Answer = answer) -> None:
            seen.setdefault(iteration, []).append(index)
            answer.deliver(chunk)

        engine.submit(request, deliver)
    for answer in answers:
        await answer.end()
    ticking.cancel()
    all_began = max(min(i for i, who in seen.items() if stream in who) for stream in range(8))
    one_ended = min(max(i for i, who in seen.items() if stream in who) for stream in range(8))
    between = [sorted(who) for i, who in seen.items() if all_began < i < one_ended]
    assert len(between) >= 5
    # A busy loop may see two steps at once, but never half of one.
    assert all(who == sorted(list(range(8)) * (len(who) // 8)) for who in between)


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens"), [(250, 7), (1, 256), (256, 1), (10_000, 1), (1, 2**31)]
)
async def test_submit_refuses_what_exceeds_max_seq_len_with_the_numbers(
    harness: Harness, prompt_len: int, max_tokens: int
) -> None:
    engine = await harness.start()
    answer = Answer(request_of(prompt_of(0, prompt_len), max_tokens))
    with pytest.raises(ContextTooLong) as caught:
        engine.submit(answer.request, answer.deliver)
    for number in (prompt_len, max_tokens, 256):
        assert str(number) in str(caught.value).replace(",", "")
    assert caught.value.param
    # Another request goes through, and the refused one was never answered.
    await tokens_of(engine, prompt_of(1, 5))
    assert not answer.chunks


async def test_submit_refuses_what_exceeds_the_pool_and_takes_what_just_fits(
    harness: Harness,
) -> None:
    engine, info = await harness.start_with_info(kv_cache_config__max_tokens=6 * BLOCK_SIZE)
    room = info.num_blocks * info.block_size
    with pytest.raises(ContextTooLong, match=str(room)):
        ask(engine, prompt_of(0, room - 9), 10)
    assert len(await tokens_of(engine, prompt_of(0, room - 9), 9)) == 9
    assert len(await tokens_of(engine, prompt_of(1, 1), room - 1)) == room - 1


async def test_a_request_may_fill_max_seq_len(harness: Harness) -> None:
    engine = await harness.start()
    assert len(await tokens_of(engine, prompt_of(0, 255), 1)) == 1
    assert len(await tokens_of(engine, prompt_of(0, 200), 56)) == 56


@pytest.mark.parametrize("name", OPTIONAL_FIELDS)
async def test_submit_honours_a_sampling_field_or_refuses_it_by_name(
    harness: Harness, name: str
) -> None:
    engine, info = await harness.start_with_info()
    value = OPTIONAL_FIELDS[name]
    if name in info.capabilities:
        assert len(await tokens_of(engine, prompt_of(0, 5), 3, **{name: value})) == 3
    else:
        with pytest.raises(RequestError, match=name) as caught:
            ask(engine, prompt_of(0, 5), 3, **{name: value})
        assert caught.value.param == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_tokens", -1),
        ("min_tokens", 9),
    ],
)
async def test_submit_refuses_impossible_values_by_name(
    harness: Harness, field: str, value: float
) -> None:
    engine = await harness.start()
    with pytest.raises(RequestError) as caught:
        ask(engine, prompt_of(0, 5), **{"max_tokens": 8, field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


@pytest.mark.parametrize("prompt", [[], [VOCAB_SIZE], [-1], [5, 2**40]])
async def test_submit_refuses_a_prompt_outside_the_vocabulary(
    harness: Harness, prompt: list[int]
) -> None:
    engine = await harness.start()
    with pytest.raises(RequestError) as caught:
        ask(engine, prompt)
    assert caught.value.param == "prompt_token_ids"
    assert engine.stats().num_waiting == 0


async def test_submit_refuses_an_id_that_is_running(harness: Harness) -> None:
    engine = await harness.start()
    answer = ask(engine, prompt_of(0, 5), 50)
    with pytest.raises(RequestError) as caught:
        engine.submit(answer.request, answer.deliver)
    assert caught.value.param == "request_id"
    assert len((await answer.end()).tokens) == 50
    engine.submit(answer.request, (again := Answer(answer.request)).deliver)  # free again now
    await again.end()


# --- streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, BLOCK_SIZE, 40])
async def test_a_stream_has_all_its_tokens_and_ends_with_length(
    harness: Harness, max_tokens: int
) -> None:
    engine = await harness.start()
    answer = await ask(engine, prompt_of(0, 30), max_tokens).end()
    assert len(answer.tokens) == max_tokens
    assert answer.finish_reason is FinishReason.LENGTH
    assert [chunk.finish_reason for chunk in answer.chunks[:-1]] == [None] * (max_tokens - 1)
    assert all(0 <= token < VOCAB_SIZE for token in answer.tokens)
    assert answer.last.num_hidden_tokens == 0


@pytest.mark.parametrize("good_chunks", [0, 4])
async def test_a_consumer_that_raises_does_not_touch_the_others(
    harness: Harness, good_chunks: int
) -> None:
    engine = await harness.start()
    loop = asyncio.get_running_loop()
    reported: list[str] = []
    loop.set_exception_handler(lambda _loop, context: reported.append(str(context["exception"])))
    expected = [await tokens_of(engine, prompt_of(i, 20), 12) for i in range(3)]

    chunks: list[TokenChunk] = []

    def broken(chunk: TokenChunk) -> None:
        chunks.append(chunk)
        if len(chunks) > good_chunks:
            raise RuntimeError("this consumer is broken")

    engine.submit(request_of(prompt_of(9, 20), 12), broken)
    answers = [ask(engine, prompt_of(i, 20), 12) for i in range(3)]
    assert [(await answer.end()).tokens for answer in answers] == expected
    assert reported
    assert set(reported) == {"this consumer is broken"}
    await tokens_of(engine, prompt_of(4, 20), 12)
    assert engine.stats().active_blocks == 0


async def test_generate_aborts_when_its_loop_is_left(harness: Harness) -> None:
    engine = await harness.start()
    async with asyncio.timeout(DEADLINE_S):
        stream = generate(engine, request_of(prompt_of(0, 20), 200))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]  # it is an async generator
        await tokens_of(engine, prompt_of(1, 5), 3)
    stats = engine.stats()
    assert (stats.num_running, stats.active_blocks, stats.aborts) == (0, 0, 1)


async def test_more_requests_than_the_batch_holds_wait_and_finish(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=3)
    answers = [ask(engine, prompt_of(i, 10), 10) for i in range(12)]
    most = 0
    for answer in answers:
        await answer.end()
        most = max(most, engine.stats().num_running)
    assert most <= 3
    assert engine.stats().finished == 12


# --- death and close ---------------------------------------------------------------------------


async def test_death_ends_streams_with_engine_dead_and_is_reported(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await harness.start()
    died = asyncio.create_task(engine.died())
    answers = [ask(engine, prompt_of(i, 10), 200) for i in range(4)]
    await answers[0].reaches(2)
    assert not died.done()
    harness.kind.kill(monkeypatch, engine)
    for answer in answers:
        await answer.end()
        assert answer.finish_reason is FinishReason.ERROR
        assert answer.last.error_code == EngineDead.code
        assert answer.last.error_message
    async with asyncio.timeout(DEADLINE_S):
        assert isinstance(await died, EngineDead)
        assert isinstance(await engine.died(), EngineDead)  # also for those who ask later
    with pytest.raises(EngineDead):
        ask(engine, prompt_of(0, 5))
    engine.abort(answers[0].request.request_id)
    assert isinstance(engine.stats(), EngineStats)


async def test_close_aborts_open_streams_and_refuses_new_ones(harness: Harness) -> None:
    engine = await harness.start(max_batch_size=4)
    answers = [ask(engine, prompt_of(i, 10), 200) for i in range(8)]
    await answers[0].reaches(2)
    await engine.close()
    for answer in answers:
        assert (await answer.end()).finish_reason is FinishReason.ABORT
    assert engine.stats().active_blocks == 0
    with pytest.raises(EngineDead):
        ask(engine, prompt_of(0, 5))
    engine.abort("unknown")
    await engine.close()


async def test_close_ends_kv_subscriptions(harness: Harness) -> None:
    engine = await harness.start()
    follower = Follower(engine)
    await follower.next()
    await engine.close()
    with pytest.raises(StopAsyncIteration):
        await follower.next()


async def test_close_is_safe_before_and_after_a_failed_start(
    harness: Harness, tmp_path: Path
) -> None:
    await harness.build().close()
    engine = harness.build(tmp_path / "missing")
    with pytest.raises(ConfigError):
        await engine.start()
    await engine.close()
    await engine.close()


async def test_close_leaves_no_thread_no_task_and_no_memory(harness: Harness) -> None:
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    engine = await harness.start()
    await tokens_of(engine, prompt_of(0, 20), 5)
    await engine.close()
    assert set(threading.enumerate()) <= threads
    assert asyncio.all_tasks() <= tasks
    seen = weakref.ref(engine)
    harness.engines.clear()
    del engine
    gc.collect()
    assert seen() is None

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.fakes import began, fakes
from tests.unit.ingress.stage import events, stage, text_of
from trtllm_workers.types import FinishReason

ANSWER = "Hello 日本 🎉 world. And more."


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("at", [1, 3, 5, 8])
async def test_a_stream_goes_on_at_another_worker_and_the_client_notices_nothing(
    checkpoint: Path, tokenizer: Tokenizer, streamed: bool, at: int
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        fields: dict[str, Any] = {"max_tokens": 40, "stop": "nothing of it"}
        if streamed:
            fields["stream_options"] = {"include_usage": True}
        asked = asyncio.create_task(playing.chat(stream=streamed, **fields))
        used, other, submit = await began(*workers)
        used.chunk(submit.stream, token_ids[:1], cached_tokens=16)
        for token_id in token_ids[1:at]:
            used.token(submit.stream, token_id)
        used.lose()
        await other.until(lambda: other.submits)
        again = other.submits[0]
        other.answer(again, token_ids[at:] if streamed else token_ids, cached_tokens=3)
        response = await asked
    prompt = submit.request.prompt_token_ids
    if streamed:
        assert again.request.prompt_token_ids == prompt + token_ids[:at]
        assert again.request.sampling.max_tokens == 40 - at
        assert text_of(response) == ANSWER
        usage = events(response)[-2]["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
    else:
        assert again.request == submit.request, "nobody has seen any of it: it starts over"
        assert response.json()["choices"][0]["message"]["content"] == ANSWER
        usage = response.json()["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == len(token_ids) + 1
    assert again.stream != submit.stream


async def test_min_tokens_shrink_with_the_tokens_there_are(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        asked = asyncio.create_task(playing.chat(stream=True, max_tokens=40, min_tokens=5))
        used, other, submit = await began(*workers)
        used.chunk(submit.stream, token_ids[:2])
        used.lose()
        await other.until(lambda: other.submits)
        assert other.submits[0].request.sampling.min_tokens == 3
        other.answer(other.submits[0], token_ids[2:])
        assert text_of(await asked) == ANSWER


async def test_a_stream_that_lacked_only_its_end_needs_no_other_worker(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids[:4]
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        asked = asyncio.create_task(playing.chat(stream=True, max_tokens=4))
        await alone.until(lambda: alone.submits)
        alone.chunk(alone.submits[0].stream, token_ids)
        alone.refuse_connections = True
        alone.lose()
        said = events(await asked)
    assert said[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1},
        {"frequency_penalty": 1},
        {"seed": 1, "temperature": 0.5},
        {"guided_regex": "Hello.*"},
    ],
)
async def test_a_stream_that_cannot_be_continued_elsewhere_ends_with_an_error_event(
    checkpoint: Path, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        call = playing.call(**fields)
        used, other, submit = await began(*workers)
        used.chunk(submit.stream, tokenizer.encode(ANSWER).ids[:2])
        await call.until("Hell")
        used.lose("reset by peer")
        said = events(await call.result())
    assert other.submits == []
    assert said[-1]["error"]["code"] == "worker_lost"
    assert said[-1]["error"]["message"] == f"worker {used.record.worker_id} was lost: reset by peer"
    assert "[DONE]" not in said


@pytest.mark.parametrize("fields", [{"seed": 1, "temperature": 0}, {"repetition_penalty": 1.5}])
async def test_greedy_seeded_and_repetition_penalised_streams_can_be_continued(
    checkpoint: Path, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        asked = asyncio.create_task(playing.chat(stream=True, **fields))
        used, other, submit = await began(*workers)
        used.chunk(submit.stream, token_ids[:2])
        used.lose()
        await other.until(lambda: other.submits)
        other.answer(other.submits[0], token_ids[2:])
        assert text_of(await asked) == ANSWER


async def test_a_stream_that_had_no_token_yet_starts_over_whatever_it_asks_for(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        asked = asyncio.create_task(playing.chat(stream=True, presence_penalty=1, seed=3))
        used, other, submit = await began(*workers)
        used.lose()
        await other.until(lambda: other.submits)
        assert other.submits[0].request == submit.request
        other.answer(other.submits[0], tokenizer.encode(ANSWER).ids)
        assert text_of(await asked) == ANSWER


async def test_with_no_other_worker_the_stream_ends_with_an_error_and_whole_ones_with_503(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        streamed = playing.call()
        await alone.until(lambda: len(alone.submits) == 1)
        whole = asyncio.create_task(playing.chat())
        await alone.until(lambda: len(alone.submits) == 2)
        unbegun = asyncio.create_task(playing.chat(stream=True))
        await alone.until(lambda: len(alone.submits) == 3)
        for submit in alone.submits[:2]:
            alone.chunk(submit.stream, tokenizer.encode(ANSWER).ids[:2])
        await streamed.until("Hell")
        alone.refuse_connections = True
        alone.lose()
        said = events(await streamed.result())
        assert said[-1]["error"]["code"] == "worker_lost"
        for response in (await whole, await unbegun):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "worker_lost"
            assert "w0 was lost" in response.json()["error"]["message"]
        metrics = (await playing.client.get("/metrics")).text
    assert 'aborted_requests_total{cause="worker_failed"} 3.0' in metrics
    assert "worker_lost_total 1.0" in metrics
    assert 'status="503"} 3.0' in metrics


async def test_a_stream_moves_only_so_often(checkpoint: Path, tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    workers = fakes(checkpoint, 4)
    async with stage(*workers, migration_limit=1) as playing:
        call = playing.call()
        used, _, submit = await began(*workers)
        used.chunk(submit.stream, token_ids[:1])
        await call.until("Hell")
        used.lose()
        rest = [worker for worker in workers if worker is not used]
        second, _, submit = await began(*rest)
        second.token(submit.stream, token_ids[1])
        second.lose()
        assert events(await call.result())[-1]["error"]["code"] == "worker_lost"


@pytest.mark.parametrize("code", ["engine_dead", "unavailable", "abort"])
async def test_a_worker_that_gives_a_stream_up_is_replaced(
    checkpoint: Path, tokenizer: Tokenizer, code: str
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        asked = asyncio.create_task(playing.chat(stream=True))
        used, other, submit = await began(*workers)
        used.chunk(submit.stream, token_ids[:2])
        if code == "abort":
            used.end(submit.stream, FinishReason.ABORT)
        else:
            used.end(submit.stream, FinishReason.ERROR, error_code=code, error_message="down")
        await other.until(lambda: other.submits)
        other.answer(other.submits[0], token_ids[2:])
        assert text_of(await asked) == ANSWER
        metrics = (await playing.client.get("/metrics")).text
    assert "migrations_total 1.0" in metrics

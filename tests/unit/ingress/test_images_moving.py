"""Streams with images that move to another worker: their images come along, or are made again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import events, stage, text_of
from tests.unit.ingress.vision import (
    CAT,
    DOG,
    Seer,
    e_p_d,
    look,
    see,
    until,
    until_encoders,
    vision_checkpoint,
    vision_info,
)
from trtllm_workers.types import FinishReason, Role, Strategy

ANSWER = "Hello 日本 🎉 world. And more."
GONE: dict[str, Any] = {"error_code": "media_gone", "error_message": "not there"}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_checkpoint(tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("streamed", [True, False])
async def test_images_that_are_gone_are_made_again_elsewhere(
    seeing: Path, tokenizer: Tokenizer, streamed: bool
) -> None:
    e0, e1, worker = e_p_d(seeing)
    async with stage(e0, e1, worker) as playing:
        await until_encoders(playing, 2)
        asked = asyncio.create_task(see(playing, CAT, DOG, stream=streamed, n=2))
        await worker.until_submits(2)
        first, second = sorted((e0, e1), key=lambda one: not one.asks)
        sent = worker.submits[0].request
        for submit in list(worker.submits):
            worker.end(submit.stream, FinishReason.ERROR, **GONE)
        await worker.until_submits(4)
        for submit in worker.submits[2:]:
            assert [one.holder for one in submit.request.media] == [second.record.address] * 2
            assert submit.request.prompt_token_ids == sent.prompt_token_ids
            assert submit.request.prompt_text == sent.prompt_text
            offsets = [one.offset for one in submit.request.media]
            assert offsets == [one.offset for one in sent.media]
            worker.answer(submit, tokenizer.encode(ANSWER).ids)
        response = await asked
        for one in (e0, e1):
            await one.until_done()
        metrics = (await playing.client.get("/metrics")).text
    assert response.status_code == 200
    assert len(first.asks) == 1
    assert len(second.asks) == 1, "once for both choices"
    assert "trtllm_launch_migrations_total 2" in metrics


async def test_a_worker_that_held_and_computed_is_replaced_with_its_images(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    used, other = Seer(seeing, "w0"), Seer(seeing, "w1")
    async with stage(used) as playing:
        call = look(playing, max_tokens=40)
        await used.until_submits(1)
        playing.plane.add(other)
        playing.discovery.show(used.record, other.record)
        await until_encoders(playing, 2)
        submit = used.submits[0]
        used.chunk(submit.stream, token_ids[:2])
        used.token(submit.stream, token_ids[2])
        used.lose()
        await other.until_submits(1)
        again = other.submits[0].request
        other.answer(other.submits[0], token_ids[3:])
        response = await call.result()
        await other.until_done()
    assert text_of(response) == ANSWER
    assert again.prompt_token_ids == submit.request.prompt_token_ids + token_ids[:3]
    assert [one.offset for one in again.media] == [one.offset for one in submit.request.media]
    assert [one.holder for one in again.media] == [other.record.address]


async def test_an_encoder_that_dies_later_disturbs_no_stream(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    encoder = Seer(seeing, "e0", Role.ENCODE)
    worker = Seer(seeing, "w0", vision=vision_info(encodes=False))
    async with stage(encoder, worker) as playing:
        await until_encoders(playing, 1)
        call = look(playing)
        await worker.until_submits(1)
        worker.chunk(worker.submits[0].stream, token_ids[:2])
        encoder.refuse_connections = True
        encoder.lose()
        worker.answer(worker.submits[0], token_ids[2:])
        assert text_of(await call.result()) == ANSWER
    assert len(worker.submits) == 1


async def test_items_that_are_still_held_are_not_made_again(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    encoder = Seer(seeing, "e0", Role.ENCODE)
    workers = [Seer(seeing, f"w{at}", vision=vision_info(encodes=False)) for at in range(2)]
    async with stage(encoder, *workers) as playing:
        await until_encoders(playing, 1)
        await playing.until(lambda: len(playing.fleet.models[MODEL].workers) == 3)
        call = look(playing)
        await until(lambda: any(worker.submits for worker in workers), *workers)
        used, other = sorted(workers, key=lambda worker: not worker.submits)
        used.lose()
        await other.until_submits(1)
        assert other.submits[0].request == used.submits[0].request
        other.answer(other.submits[0], tokenizer.encode(ANSWER).ids)
        assert text_of(await call.result()) == ANSWER
        await encoder.until_done()
    assert len(encoder.asks) == 1


async def test_the_migration_limit_bounds_how_often_images_are_made(seeing: Path) -> None:
    worker = Seer(seeing, "w0")
    worker.script = lambda one, submit: one.end(submit.stream, FinishReason.ERROR, **GONE)
    async with stage(worker, migration_limit=2) as playing:
        response = await see(playing, CAT)
        await worker.until_done()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "media_gone"
    assert len(worker.submits) == 3
    assert len(worker.asks) == 3


async def test_an_image_that_has_changed_meanwhile_is_an_error(seeing: Path) -> None:
    worker = Seer(seeing, "w0")
    async with stage(worker) as playing:
        call = look(playing)
        await worker.until_submits(1)
        worker.sees = "changed"
        worker.end(worker.submits[0].stream, FinishReason.ERROR, **GONE)
        response = await call.result()
        await worker.until_done()
    assert response.status_code == 503
    assert "shows something else now" in response.json()["error"]["message"]
    assert len(worker.submits) == 1


async def test_no_encoder_left_is_what_a_moving_stream_ends_with(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    encoder = Seer(seeing, "e0", Role.ENCODE)
    worker = Seer(seeing, "w0", vision=vision_info(encodes=False))
    async with stage(encoder, worker) as playing:
        await until_encoders(playing, 1)
        call = look(playing)
        await worker.until_submits(1)
        worker.chunk(worker.submits[0].stream, tokenizer.encode(ANSWER).ids[:2])
        await call.until("Hell")
        encoder.refuse_connections = True
        encoder.lose()
        worker.end(worker.submits[0].stream, FinishReason.ERROR, **GONE)
        said = events(await call.result())
    assert "no encode worker of 'test/tiny' is ready" in said[-1]["error"]["message"]


async def test_a_client_that_leaves_while_its_images_are_made_again(seeing: Path) -> None:
    worker = Seer(seeing, "w0")
    async with stage(worker) as playing:
        call = look(playing)
        await worker.until_submits(1)
        worker.waits = True
        worker.end(worker.submits[0].stream, FinishReason.ERROR, **GONE)
        await worker.until_asked(2)
        call.left.set()
        await call.result()
        await worker.until_done()
        assert playing.ingress.dispatcher is not None
        assert playing.ingress.dispatcher.num_answers == 0
    assert len(worker.submits) == 1


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_encode_prefill_and_decode_workers_share_a_request(
    seeing: Path, tokenizer: Tokenizer, strategy: Strategy
) -> None:
    encoder = Seer(seeing, "e0", Role.ENCODE)
    prefill = Seer(seeing, "p0", Role.PREFILL)
    blind = Worker(seeing, "p1", Role.PREFILL, info={"vocab_size": 401})
    decode = Seer(seeing, "d0", Role.DECODE, prefill, blind)
    ids = tokenizer.encode(ANSWER).ids
    decode.script = lambda worker, submit: worker.answer(submit, ids)
    prefill.script = lambda _worker, submit: decode.answer(submit, ids)
    async with stage(encoder, prefill, blind, decode, strategy=strategy) as playing:
        await playing.until(lambda: len(playing.fleet.models[MODEL].workers) == 4)
        await playing.until(lambda: playing.fleet.models[MODEL].whole)
        for _ in range(3):
            assert (await see(playing, CAT)).status_code == 200
        await encoder.until_done()
    assert len(encoder.asks) == 3
    assert not blind.submits
    submits = prefill.submits if strategy is Strategy.PREFILL_FIRST else decode.submits
    assert len(submits) == 3
    for submit in submits:
        assert submit.request.media[0].holder == encoder.record.address
        if strategy is Strategy.DECODE_FIRST:
            assert submit.prefill == prefill.record.address

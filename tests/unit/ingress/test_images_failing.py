"""Images whose encoder refuses, dies or is slow, whose client leaves, or that are gone when needed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL
from tests.unit.ingress.fakes import says
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import Call, Stage, events, stage, text_of
from tests.unit.ingress.vision import (
    CAT,
    DOG,
    Seer,
    image,
    see,
    text,
    until,
    user,
    vision_checkpoint,
    vision_info,
)
from trtllm_workers.planes.media_messages import EncodeFailed
from trtllm_workers.planes.messages import Drain
from trtllm_workers.types import FinishReason, Role, Strategy

ANSWER = "Hello 日本 🎉 world. And more."
GONE: dict[str, Any] = {"error_code": "media_gone", "error_message": "not there"}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_checkpoint(tmp_path_factory.mktemp("vision"))


def look(playing: Stage, *urls: str, **fields: Any) -> Call:
    """Begin a streamed chat about images that can be watched."""
    return playing.call(messages=[user(*map(image, urls or (CAT,)), text("?"))], **fields)


async def asked_one(*workers: Seer) -> tuple[Seer, Seer]:
    """Return the worker that was asked for images, and the other one."""
    await until(lambda: any(worker.asks for worker in workers), *workers)
    first, second = sorted(workers, key=lambda worker: not worker.asks)
    return first, second


async def until_encoders(playing: Stage, count: int) -> None:
    served = playing.fleet.models
    await playing.until(lambda: len(served[MODEL].encoders()) == count)


def e_p_d(seeing: Path, **fields: Any) -> tuple[Seer, Seer, Seer]:
    """Return two encode workers and a worker that cannot encode."""
    e0, e1 = (Seer(seeing, f"e{at}", Role.ENCODE, **fields) for at in range(2))
    return e0, e1, Seer(seeing, "w0", vision=vision_info(encodes=False))


# --- the encoder's word ----------------------------------------------------------------------------


async def test_what_the_encoder_finds_wrong_is_the_clients_error(seeing: Path) -> None:
    param = "messages[0].content[1].image_url"
    worker = Seer(seeing, "w0", refuses=("invalid_image", "not an image", param))
    other = Seer(seeing, "w1", refuses=("invalid_image", "not an image", param))
    async with stage(worker, other) as playing:
        response = await see(playing, CAT, stream=True)
        metrics = (await playing.client.get("/metrics")).text
        for one in (worker, other):
            await one.until_done()
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"], error["code"]) == (
        "not an image",
        param,
        "invalid_image",
    )
    assert len(worker.asks) + len(other.asks) == 1, "another one would find the same"
    assert 'image_encode_seconds_count{model="test/tiny",outcome="refused"} 1' in metrics
    assert not worker.submits


async def test_what_the_engine_cannot_do_with_images_is_said_of_the_image(seeing: Path) -> None:
    worker = Seer(seeing, "w0")
    worker.script = lambda one, submit: one.end(
        submit.stream,
        FinishReason.ERROR,
        error_code="unsupported_parameter",
        error_message="images not with this",
        error_param="media",
    )
    async with stage(worker) as playing:
        response = await see(playing, CAT)
        await worker.until_done()
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[1].image_url"


@pytest.mark.parametrize("code", ["unavailable", "engine_dead", "overloaded", "worker_lost"])
async def test_an_encoder_that_cannot_is_replaced_by_another(
    seeing: Path, tokenizer: Tokenizer, code: str
) -> None:
    e0, e1, worker = e_p_d(seeing, waits=True)
    worker.script = says(tokenizer, ANSWER)
    async with stage(e0, e1, worker) as playing:
        await until_encoders(playing, 2)
        call = look(playing)
        first, second = await asked_one(e0, e1)
        first.say(EncodeFailed(first.asks[0].ask, code, "not now"))
        second.encode(await second.until_asked())
        assert text_of(await call.result()) == ANSWER
        for one in (e0, e1):
            await one.until_done()
        metrics = (await playing.client.get("/metrics")).text
    assert worker.submits[0].request.media[0].holder == second.record.address
    assert 'trtllm_launch_image_encode_retries_total{model="test/tiny"} 1' in metrics


async def test_an_encoder_that_dies_is_replaced_by_another(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    e0, e1, worker = e_p_d(seeing, waits=True)
    worker.script = says(tokenizer, ANSWER)
    async with stage(e0, e1, worker) as playing:
        await until_encoders(playing, 2)
        call = look(playing)
        first, second = await asked_one(e0, e1)
        first.refuse_connections = True
        first.lose()
        second.encode(await second.until_asked())
        assert text_of(await call.result()) == ANSWER
        await second.until_done()
        assert (await playing.client.get("/ready")).json() == {"status": "ready"}
    assert first.done == [], "with its connection went the ask"


async def test_without_encoders_images_wait_for_none_and_texts_go_on(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    e0, e1, worker = e_p_d(seeing, waits=True)
    worker.script = says(tokenizer, ANSWER)
    async with stage(e0, e1, worker) as playing:
        await until_encoders(playing, 2)
        call = look(playing)
        first, second = await asked_one(e0, e1)
        for one in (first, second):
            one.refuse_connections = True
            await one.until_asked()
            one.lose("killed")
        lost = await call.result()
        later = await see(playing, CAT)
        assert (await playing.chat()).status_code == 200
        ready = await playing.client.get("/ready")
        models = (await playing.client.get("/v1/models")).json()["data"]
        health = (await playing.client.get("/health")).json()["models"][MODEL]
    for response in (lost, later):
        assert response.status_code == 503
        assert "no encode worker of 'test/tiny' is ready" in response.json()["error"]["message"]
        assert "e0 is unreachable" in response.json()["error"]["message"]
    assert ready.status_code == 200
    assert "no encode worker of 'test/tiny' is ready" in ready.json()["degraded"][MODEL]
    assert len(models) == 1
    assert health["ready"]


async def test_all_too_busy_is_told_as_such(seeing: Path) -> None:
    e0, e1, worker = e_p_d(seeing, refuses=("overloaded", "the store is full", None))
    async with stage(e0, e1, worker) as playing:
        await until_encoders(playing, 2)
        response = await see(playing, CAT)
        for one in (e0, e1):
            await one.until_done()
    assert response.status_code == 429
    assert len(e0.asks) == len(e1.asks) == 1


async def test_a_worker_that_computes_prompts_encodes_when_encode_workers_fail(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    encoder = Seer(seeing, "e0", Role.ENCODE, refuses=("unavailable", "draining", None))
    worker = Seer(seeing, "w0")
    worker.script = says(tokenizer, ANSWER)
    async with stage(encoder, worker) as playing:
        await playing.until(lambda: playing.fleet.models[MODEL].encoders()[0].role is Role.ENCODE)
        assert (await see(playing, CAT)).status_code == 200
        encoder.say(Drain("it is time"))
        assert (await see(playing, CAT)).status_code == 200
    assert len(encoder.asks) == 1
    assert len(worker.asks) == 2


async def test_an_encode_worker_alone_makes_no_model(seeing: Path) -> None:
    encoder = Seer(seeing, "e0", Role.ENCODE)
    async with stage(encoder, ready=False) as playing:
        models = playing.fleet.models
        await playing.until(lambda: MODEL in models and models[MODEL].workers[0].takes_requests)
        ready = await playing.client.get("/ready")
        asked = await see(playing, CAT)
        listed = (await playing.client.get("/v1/models")).json()["data"]
    assert ready.status_code == 503
    assert ready.json()["missing"] == {MODEL: "only encode workers have registered"}
    assert asked.status_code == 503
    assert listed == []


async def test_an_encode_worker_of_another_checkpoint_is_refused(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    stranger = Seer(seeing, "e0", Role.ENCODE, info={"model_id": "another"}, started_at_s=1.0)
    worker = Seer(seeing, "w0")
    worker.script = says(tokenizer, ANSWER)
    async with stage(stranger, worker) as playing:
        await playing.until(lambda: len(playing.fleet.models[MODEL].workers) == 2)
        assert (await see(playing, CAT)).status_code == 200
        shown = (await playing.client.get("/health")).json()["models"][MODEL]["workers"]
    assert not stranger.asks
    assert {one["worker_id"]: one["state"] for one in shown} == {"e0": "refused", "w0": "ready"}


@pytest.mark.parametrize("items", ["none", "fewer", "empty"])
async def test_no_image_is_left_out_by_an_encoder(seeing: Path, items: str) -> None:
    worker = Seer(seeing, "w0")
    urls = {"none": [f"{CAT}#0", DOG], "fewer": [CAT], "empty": [CAT, DOG]}[items]
    if items == "empty":
        worker.num_tokens = 0
    async with stage(worker) as playing:
        if items == "fewer":
            worker.waits = True
            asked = asyncio.create_task(see(playing, CAT, DOG))
            ask = await worker.until_asked()
            del ask.references[1]
            worker.encode(ask)
            response = await asked
        else:
            response = await see(playing, *urls)
        await worker.until_done()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_error"
    assert not worker.submits


# --- deadlines and clients -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["encode_timeout_s", "request_timeout_s"])
async def test_an_encoder_that_does_not_answer_is_not_waited_for(seeing: Path, limit: str) -> None:
    worker = Seer(seeing, "w0", waits=True)
    settings: dict[str, Any] = {limit: 0.05}
    async with stage(worker, **settings) as playing:
        response = await see(playing, CAT)
        await worker.until_done()
        assert playing.ingress.dispatcher is not None
        assert playing.ingress.dispatcher.num_answers == 0
        worker.encode(worker.asks[0])  # nobody minds any more
    assert response.status_code == 503
    assert "0.05 s" in response.json()["error"]["message"]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_while_images_are_encoded(
    seeing: Path, tokenizer: Tokenizer, streamed: bool
) -> None:
    worker = Seer(seeing, "w0", waits=True)
    worker.script = says(tokenizer, ANSWER)
    async with stage(worker) as playing:
        call = look(playing, stream=streamed)
        ask = await worker.until_asked()
        assert playing.ingress.dispatcher is not None
        assert not playing.ingress.dispatcher.idle.is_set(), "a drain waits for it"
        call.left.set()
        await call.result()
        await worker.until_done()
        worker.encode(ask)
        metrics = (await playing.client.get("/metrics")).text
        assert playing.ingress.dispatcher.idle.is_set()
        worker.waits = False
        assert (await see(playing, CAT)).status_code == 200
    assert len(worker.submits) == 1
    assert (
        'requests_total{endpoint="/v1/chat/completions",model="test/tiny",status="499"} 1'
        in metrics
    )
    assert 'image_encode_seconds_count{model="test/tiny",outcome="abandoned"} 1' in metrics


async def test_a_client_that_leaves_later_lets_the_items_go_once(seeing: Path) -> None:
    worker = Seer(seeing, "w0")
    async with stage(worker) as playing:
        call = look(playing)
        await worker.until_submits(1)
        assert worker.done == [], "the items are needed until the answer ends"
        call.left.set()
        await call.result()
        await worker.until_done()
    assert worker.aborted == [worker.submits[0].stream]


async def test_a_shutdown_ends_requests_whose_images_are_encoded(seeing: Path) -> None:
    worker = Seer(seeing, "w0", waits=True)
    async with stage(worker) as playing:
        asked = asyncio.create_task(see(playing, CAT))
        await worker.until_asked()
        assert playing.ingress.dispatcher is not None
        playing.ingress.dispatcher.abort_all("the ingress is stopping")
        response = await asked
        await worker.until_done()
    assert response.status_code == 503
    assert "the ingress is stopping" in response.json()["error"]["message"]


async def test_an_answer_to_somebody_elses_ask_is_ignored(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    e0, e1, worker = e_p_d(seeing, waits=True)
    worker.script = says(tokenizer, ANSWER)
    async with stage(e0, e1, worker) as playing:
        await until_encoders(playing, 2)
        call = look(playing)
        asked, other = await asked_one(e0, e1)
        other.encode(asked.asks[0])
        asked.encode(asked.asks[0])
        assert text_of(await call.result()) == ANSWER
    assert worker.submits[0].request.media[0].holder == asked.record.address


# --- moving ----------------------------------------------------------------------------------------


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

"""Images whose encoder refuses, dies or is slow, whose client leaves, or that are gone when needed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL
from tests.unit.ingress.fakes import says
from tests.unit.ingress.stage import stage, text_of
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
)
from trtllm_workers.errors import FrameError
from trtllm_workers.planes.media_messages import EncodeAsk, EncodeFailed
from trtllm_workers.planes.messages import Drain, Message
from trtllm_workers.types import FinishReason, Role

ANSWER = "Hello 日本 🎉 world. And more."


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_checkpoint(tmp_path_factory.mktemp("vision"))


async def asked_one(*workers: Seer) -> tuple[Seer, Seer]:
    """Return the worker that was asked for images, and the other one."""
    await until(lambda: any(worker.asks for worker in workers), *workers)
    first, second = sorted(workers, key=lambda worker: not worker.asks)
    return first, second


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


async def test_workers_that_leave_while_images_are_encoded(seeing: Path) -> None:
    e0, e1, worker = e_p_d(seeing, waits=True)
    async with stage(e0, e1, worker) as playing:
        await until_encoders(playing, 2)
        asked = asyncio.create_task(see(playing, CAT))
        first, _ = await asked_one(e0, e1)
        playing.discovery.show(e0.record, e1.record)
        await playing.until(lambda: not playing.fleet.models[MODEL].makers)
        first.encode(first.asks[0])
        response = await asked
        await first.until_done()
    assert response.status_code == 503
    assert "has no worker left" in response.json()["error"]["message"]


async def test_images_that_no_message_can_carry_are_refused(
    seeing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Seer(seeing, "w0")
    async with stage(worker) as playing:
        assert worker.peer is not None
        send = worker.peer.send

        def real_send(message: Message) -> None:
            if isinstance(message, EncodeAsk):
                raise FrameError("a message of 99 bytes is over the limit")
            send(message)

        monkeypatch.setattr(worker.peer, "send", real_send)
        response = await see(playing, CAT)
    assert response.status_code == 413
    assert response.json()["error"]["param"] == "messages[0].content[1].image_url"

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import record
from tests.unit.ingress.fakes import FakeWorker, began, fakes, says
from tests.unit.ingress.stage import events, stage, text_of
from trtllm_workers.planes.messages import Drain, Submit, WorkerStats
from trtllm_workers.types import EngineStats, FinishReason, TokenLogprob, WorkerState

ANSWER = "Hello 日本 🎉 world. And more."


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("engine_error", 500, "server_error"),
        ("context_length_exceeded", 400, "invalid_request_error"),
        ("overloaded", 429, "rate_limit_error"),
        ("something else", 500, "server_error"),
    ],
)
async def test_an_error_of_the_engine_is_the_status_or_the_last_event(
    checkpoint: Path, tokenizer: Tokenizer, code: str, status: int, kind: str
) -> None:
    def fails(worker: FakeWorker, submit: Submit) -> None:
        worker.end(submit.stream, FinishReason.ERROR, error_code=code, error_message="no blocks")

    workers = fakes(checkpoint)
    for worker in workers:
        worker.script = fails
    async with stage(*workers) as playing:
        for streamed in (False, True):
            response = await playing.chat(stream=streamed)
            assert response.status_code == status
            assert response.json()["error"]["message"] == "no blocks"
            assert response.json()["error"]["type"] == kind
        for worker in workers:
            worker.script = None
            worker.submits.clear()
        call = playing.call()
        used, _, submit = await began(*workers)
        used.chunk(submit.stream, tokenizer.encode(ANSWER).ids[:1])
        await call.until("Hell")
        fails(used, submit)
        assert events(await call.result())[-1]["error"]["message"] == "no blocks"
        assert sum(len(worker.submits) for worker in workers) == 1, "not a worker's death"


async def test_one_choice_that_fails_ends_all_choices(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        asked = asyncio.create_task(playing.chat(n=3))
        await alone.until(lambda: len(alone.submits) == 3)
        alone.end(
            alone.submits[1].stream,
            FinishReason.ERROR,
            error_code="engine_error",
            error_message="no",
        )
        assert (await asked).status_code == 500
        assert alone.aborted == [alone.submits[0].stream, alone.submits[2].stream]


async def test_a_stream_that_breaks_the_ingress_does_not_disturb_the_others(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        broken = asyncio.create_task(playing.chat(logprobs=True))
        await alone.until(lambda: len(alone.submits) == 1)
        good = asyncio.create_task(playing.chat())
        await alone.until(lambda: len(alone.submits) == 2)
        # Two tokens and one logprob: not what the contract says.
        alone.chunk(alone.submits[0].stream, [300, 301], logprobs=(TokenLogprob(300, -1.0),))
        alone.answer(alone.submits[1], tokenizer.encode(ANSWER).ids)
        assert (await broken).status_code == 500
        assert (await good).status_code == 200
        assert alone.submits[0].stream in alone.aborted


async def test_equal_workers_take_turns_and_the_least_loaded_comes_first(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    workers = fakes(checkpoint, 3)
    async with stage(*workers) as playing:
        asked = [asyncio.create_task(playing.chat(n=2)) for _ in range(6)]
        for worker in workers:
            await worker.until_submits(4)
        idle = workers[1]
        for submit in idle.submits:
            idle.answer(submit, [300])
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        assert done
        asked += [asyncio.create_task(playing.chat()) for _ in range(2)]
        await idle.until(lambda: len(idle.submits) == 6)
        for worker in workers:
            for submit in worker.submits:
                worker.answer(submit, [300])
        assert {response.status_code for response in await asyncio.gather(*asked)} == {200}
        assert all(worker.in_flight == 0 for worker in playing.fleet.models["test/tiny"].workers)


async def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    workers = fakes(checkpoint)
    async with stage(*workers) as playing:
        asked = asyncio.create_task(playing.chat(stream=True))
        used, other, submit = await began(*workers)
        other.script = says(tokenizer, "other")
        used.say(Drain("it was told to stop"))
        for _ in range(4):
            assert (await playing.chat()).json()["choices"][0]["message"]["content"] == "other"
        assert len(used.submits) == 1
        health = (await playing.client.get("/health")).json()
        shown = {one["worker_id"]: one for one in health["models"]["test/tiny"]["workers"]}
        assert shown[used.record.worker_id]["state"] == "draining"
        assert shown[used.record.worker_id]["problem"] == "it was told to stop"
        playing.discovery.show(other.record)
        await playing.until(lambda: len(playing.fleet.models["test/tiny"].workers) == 1)
        used.answer(submit, tokenizer.encode(ANSWER).ids)
        assert text_of(await asked) == ANSWER


async def test_a_worker_that_left_discovery_and_then_dies_still_fails_its_streams(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        asked = asyncio.create_task(playing.chat(stream=True))
        await alone.until(lambda: alone.submits)
        playing.discovery.show()
        await playing.until(lambda: not playing.fleet.models)
        alone.lose()
        assert (await asked).status_code == 503


async def test_a_worker_that_says_draining_in_discovery_gets_nothing(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    leaving, staying = fakes(checkpoint)
    staying.script = says(tokenizer, "staying")
    async with stage(leaving, staying) as playing:
        draining = msgspec.structs.replace(leaving.record, state=WorkerState.DRAINING)
        playing.discovery.show(draining, staying.record)
        [first, _] = playing.fleet.models["test/tiny"].workers
        await playing.until(lambda: first.draining)
        for _ in range(3):
            assert (await playing.chat()).status_code == 200
    assert leaving.submits == []


async def test_a_worker_that_comes_back_is_used_again(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    alone.script = says(tokenizer, ANSWER)
    async with stage(alone) as playing:
        alone.lose()
        await playing.until_ready()
        assert (await playing.chat()).status_code == 200


async def test_a_request_avoids_a_worker_that_cannot_honour_it(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    plain = FakeWorker(record(checkpoint, "w0", capabilities=()), says(tokenizer, "plain"))
    able = FakeWorker(record(checkpoint, "w1"), says(tokenizer, "able"))
    async with stage(plain, able) as playing:
        for _ in range(4):
            said = (await playing.chat(top_k=3)).json()
            assert said["choices"][0]["message"]["content"] == "able"


async def test_several_models_are_served_side_by_side(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    one = FakeWorker(record(checkpoint, "w0", "one"), says(tokenizer, "one"))
    two = FakeWorker(record(checkpoint, "w1", "two"), says(tokenizer, "two"))
    async with stage(one, two) as playing:
        for name in ("one", "two"):
            said = (await playing.chat(model=name)).json()
            assert said["model"] == name
            assert said["choices"][0]["message"]["content"] == name
        listed = (await playing.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["one", "two"]


async def test_a_workers_load_is_shown_while_it_is_there(checkpoint: Path) -> None:
    [alone] = fakes(checkpoint, 1)
    stats = EngineStats(num_running=3, total_blocks=64, active_blocks=5, num_steps=70)
    running = 'engine_running_requests{worker_id="w0"} 3.0'
    async with stage(alone) as playing:
        alone.say(WorkerStats("w0", stats, 9))
        health = (await playing.client.get("/health")).json()
        metrics = (await playing.client.get("/metrics")).text
        again = (await playing.client.get("/metrics")).text
        playing.discovery.show()
        await playing.until(lambda: not playing.fleet.models)
        gone = (await playing.client.get("/metrics")).text
    [shown] = health["models"]["test/tiny"]["workers"]
    assert shown["stats"]["num_running"] == 3
    for text in (metrics, again):
        assert running in text
        assert 'engine_blocks{state="active",worker_id="w0"} 5.0' in text
        assert 'engine_steps_total{worker_id="w0"} 70.0' in text
        assert 'frames_sent_total{worker_id="w0"} 9.0' in text
    assert 'worker_id="w0"' not in gone


async def test_discovery_that_fails_leaves_the_known_workers_in_place(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    [alone] = fakes(checkpoint, 1)
    alone.script = says(tokenizer, ANSWER)
    monkeypatch.setattr("trtllm_workers.ingress.fleet.LAST_RETRY_S", 0.01)
    async with stage(alone) as playing:
        playing.discovery.fail()
        await asyncio.wait_for(playing.discovery.failed_twice.wait(), 5)
        assert (await playing.chat()).status_code == 200


async def test_late_tokens_of_an_ended_stream_are_dropped(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    alone.script = says(tokenizer, ANSWER)
    async with stage(alone) as playing:
        assert (await playing.chat()).status_code == 200
        number = alone.submits[0].stream
        alone.token(number, 300)
        alone.chunk(number, [300])
        alone.end(number)
        assert (await playing.chat()).status_code == 200


async def test_draining_the_ingress_refuses_new_requests_and_waits_for_running_ones(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        asked = asyncio.create_task(playing.chat())
        await alone.until(lambda: alone.submits)
        assert not await playing.ingress.drain("SIGTERM was received", 0.01)
        refused = await playing.chat()
        ready = await playing.client.get("/ready")
        drained = asyncio.create_task(playing.ingress.drain("SIGTERM was received", 5))
        alone.answer(alone.submits[0], [300])
        assert await drained
        assert (await asked).status_code == 200
    assert refused.status_code == 503
    assert "takes no new requests: SIGTERM was received" in refused.text
    assert ready.status_code == 503


async def test_aborting_all_ends_every_stream_with_an_error_event(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        call = playing.call()
        await alone.until(lambda: alone.submits)
        alone.chunk(alone.submits[0].stream, tokenizer.encode(ANSWER).ids[:1])
        await call.until("Hell")
        dispatcher = playing.ingress.dispatcher
        assert dispatcher is not None
        dispatcher.abort_all("the ingress is stopping")
        said = events(await call.result())
    assert said[-1]["error"]["message"] == "the ingress is stopping"
    assert alone.aborted == [alone.submits[0].stream]


async def test_a_client_that_leaves_aborts_its_streams_at_once(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    [alone] = fakes(checkpoint, 1)
    async with stage(alone) as playing:
        for begun in (False, True):
            alone.submits.clear()
            alone.aborted.clear()
            call = playing.call(n=2)
            await alone.until(lambda: len(alone.submits) == 2)
            if begun:
                alone.chunk(alone.submits[0].stream, tokenizer.encode(ANSWER).ids[:1])
                await call.until("Hell")
            call.left.set()
            await alone.until(lambda: alone.aborted)
            assert alone.aborted == [submit.stream for submit in alone.submits]
            await call.result()
        metrics = (await playing.client.get("/metrics")).text
    assert 'aborted_requests_total{cause="client_left"} 2.0' in metrics
    assert 'status="499"} 2.0' in metrics


async def test_another_checkpoint_of_the_same_name_is_not_mixed_in(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    first = FakeWorker(record(checkpoint, "w0"), says(tokenizer, ANSWER))
    stranger = FakeWorker(
        msgspec.structs.replace(
            record(checkpoint, "w1", model_id="other weights"), started_at_s=1_800_000_000.0
        ),
        says(tokenizer, "Something else."),
    )
    async with stage(first, stranger) as playing:
        await playing.until(lambda: len(playing.fleet.models["test/tiny"].workers) == 2)
        for _ in range(6):
            assert (await playing.chat()).status_code == 200
        assert len(first.submits) == 6
        assert not stranger.submits
        workers = (await playing.client.get("/health")).json()["models"]["test/tiny"]["workers"]
        told = next(one for one in workers if one["worker_id"] == "w1")
        assert told["state"] == "refused"
        assert "other weights" in told["problem"]
        assert "--served-model-name" in told["problem"]
        playing.discovery.show(stranger.record)  # the first one is gone: now the name is its
        await playing.until(lambda: len(playing.fleet.models["test/tiny"].workers) == 1)
        assert (await playing.chat()).status_code == 200
        assert len(stranger.submits) == 1

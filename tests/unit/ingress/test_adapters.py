"""Adapters as models of their own: who is asked, when they are listed, whose name wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL, record
from tests.unit.ingress.fakes import FakeWorker, Script, began, says
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import Stage, stage, text_of
from trtllm_workers.ingress.adapters import homes
from trtllm_workers.types import Role, Strategy, WorkerRecord

ANSWER = "Hello world. And more."
PREFILL_FIRST: Any = {"strategy": Strategy.PREFILL_FIRST}


def holder(
    checkpoint: Path, name: str, *loras: str, model: str = MODEL, script: Script | None = None
) -> FakeWorker:
    return FakeWorker(record(checkpoint, name, model, loras=loras), script)


async def until_listed(playing: Stage, *names: str) -> list[Any]:
    """Wait until exactly these models are ready, then return how they are listed."""
    fleet = playing.fleet

    def ready() -> list[str]:
        known = {**fleet.adapters, **fleet.models}
        return sorted(name for name, served in known.items() if served.ready)

    await playing.until(lambda: ready() == sorted(names))
    listed: list[Any] = (await playing.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == sorted(names)
    return listed


async def test_an_adapter_is_listed_with_its_base_model(checkpoint: Path) -> None:
    async with stage(holder(checkpoint, "w0", "fr", "de"), holder(checkpoint, "w1")) as playing:
        german, french, base = await until_listed(playing, MODEL, "de", "fr")
        one = (await playing.client.get("/v1/models/de")).json()
        unknown = await playing.chat(model="es")
        health = (await playing.client.get("/health")).json()["models"][MODEL]
    assert one == german
    assert (french["parent"], french["root"]) == (MODEL, MODEL)
    assert (base["parent"], base["root"]) == (None, MODEL)
    assert french["created"] == base["created"]
    assert unknown.json()["error"]["message"] == (
        "no model 'es' is served here; models: de, fr, test/tiny"
    )
    assert health["adapters"]["fr"] == {"ready": True, "workers": ["w0"]}
    assert health["workers"][0]["loras"] == ["fr", "de"]
    assert "loras" not in health["workers"][1]


async def test_a_request_for_an_adapter_goes_only_to_those_that_hold_it(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    answer = says(tokenizer, ANSWER)
    with_it = holder(checkpoint, "w0", "fr", script=answer)
    without = holder(checkpoint, "w1", script=answer)
    async with stage(with_it, without) as playing:
        await until_listed(playing, MODEL, "fr")
        for _ in range(4):
            adapted = await playing.chat(model="fr")
        assert not without.submits
        assert [submit.request.lora for submit in with_it.submits] == ["fr"] * 4
        for _ in range(4):
            plain = await playing.chat()
        metrics = (await playing.client.get("/metrics")).text
    assert adapted.json()["model"] == "fr"
    assert adapted.json()["choices"][0]["message"]["content"] == ANSWER
    assert plain.json()["model"] == MODEL
    assert len(without.submits) == 2
    assert {submit.request.lora for submit in without.submits} == {""}
    registered = f'registered_workers{{model="{MODEL}",role="aggregated",state="ready"}} 2'
    assert registered in metrics, "a worker with an adapter is one worker"


async def test_a_stream_of_an_adapter_moves_only_where_it_is(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    holders = [holder(checkpoint, name, "fr") for name in ("w0", "w1")]
    without = holder(checkpoint, "w2")
    async with stage(*holders, without) as playing:
        await until_listed(playing, MODEL, "fr")
        call = playing.call(model="fr")
        used, other, submit = await began(*holders)
        used.chunk(submit.stream, token_ids[:2])
        used.refuse_connections = True
        used.lose()
        await other.until_submits(1)
        assert other.submits[0].request.lora == "fr"
        other.chunk(other.submits[0].stream, token_ids[2:4])
        other.refuse_connections = True
        other.lose("gone too")
        assert "worker_lost" in (await call.result()).text
        refused = await playing.chat(model="fr")
    assert not without.submits
    assert refused.status_code == 503
    assert "model 'fr' is not ready: worker w0 is unreachable" in refused.text


async def test_an_adapter_appears_when_a_whole_chain_has_it(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    plain = Worker(checkpoint, "p0", Role.PREFILL)
    prefill = Worker(checkpoint, "p1", Role.PREFILL, info={"loras": ("fr",)})
    decode = Worker(checkpoint, "d0", Role.DECODE, plain, info={"loras": ("fr",)})
    async with stage(plain, decode, **PREFILL_FIRST) as playing:
        await until_listed(playing, MODEL)
        refused = await playing.chat(model="fr")
        assert refused.status_code == 503
        assert "decode worker d0 has no prefill worker that holds this adapter" in refused.text
        ready = await playing.client.get("/ready")
        assert ready.status_code == 200
        assert "holds this adapter" in ready.json()["degraded"]["fr"]

        playing.plane.add(prefill)
        playing.discovery.show(plain.record, prefill.record, decode.record)
        decode.prefills.append(prefill)
        decode.tell()
        await until_listed(playing, MODEL, "fr")
        await playing.until(lambda: len(playing.fleet.models[MODEL].workers) == 3)
        assert (await playing.client.get("/ready")).json() == {"status": "ready"}
        prefill.script = lambda _worker, submit: decode.answer(submit, tokenizer.encode(ANSWER).ids)
        for _ in range(3):
            assert text_of(await playing.chat(model="fr", stream=True)) == ANSWER
    assert not plain.submits
    assert [submit.request.lora for submit in prefill.submits] == ["fr"] * 3
    assert prefill.submits[0].decode == decode.record.address


async def test_an_adapter_that_only_a_prefill_worker_has_is_not_listed(checkpoint: Path) -> None:
    prefill = Worker(checkpoint, "p0", Role.PREFILL, info={"loras": ("fr",)})
    decode = Worker(checkpoint, "d0", Role.DECODE, prefill)
    async with stage(prefill, decode) as playing:
        await until_listed(playing, MODEL)
        refused = await playing.chat(model="fr")
    assert refused.status_code == 503
    assert f"no aggregated or decode worker of '{MODEL}' holds this adapter" in refused.text


async def test_an_adapter_goes_with_its_last_holder(checkpoint: Path) -> None:
    with_it, without = holder(checkpoint, "w0", "fr"), holder(checkpoint, "w1")
    async with stage(with_it, without) as playing:
        await until_listed(playing, MODEL, "fr")
        playing.discovery.show(without.record)
        await until_listed(playing, MODEL)
        assert (await playing.chat(model="fr")).status_code == 404


async def test_a_base_model_keeps_its_name_and_the_clash_is_told_once(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    answer = says(tokenizer, ANSWER)
    base = holder(checkpoint, "w0", model="fr", script=answer)
    other = holder(checkpoint, "w1", "fr", "de", script=answer)
    with capture_logs() as logs:
        async with stage(base, other) as playing:
            await until_listed(playing, MODEL, "de", "fr")
            playing.discovery.show(other.record, base.record)
            assert (await playing.chat(model="fr")).json()["model"] == "fr"
    assert base.submits[0].request.lora == ""
    assert not other.submits
    clashes = [entry["clash"] for entry in logs if "clash" in entry]
    assert len(clashes) == 1
    assert clashes[0].startswith(f"'fr' is a base model and an adapter of '{MODEL}'")


def claim(checkpoint: Path, model: str, started_at_s: float, *loras: str) -> WorkerRecord:
    made = record(checkpoint, "w", model, loras=loras)
    return msgspec.structs.replace(made, started_at_s=started_at_s)


@pytest.mark.parametrize("turned", [False, True])
def test_of_two_base_models_the_older_holder_has_the_adapter(
    checkpoint: Path, turned: bool
) -> None:
    records = [
        claim(checkpoint, "a", 30.0, "fr"),
        claim(checkpoint, "b", 40.0, "fr", "de"),
        claim(checkpoint, "b", 20.0, "fr"),
    ]
    home, clashes = homes(records[::-1] if turned else records)
    assert home == {"fr": "b", "de": "b"}
    assert len(clashes) == 1
    assert clashes[0].startswith("adapter 'fr' belongs to 'b' and 'a'; requests for it go to that")


def test_without_adapters_there_is_nothing_to_clash(checkpoint: Path) -> None:
    assert homes([claim(checkpoint, "a", 1.0), claim(checkpoint, "b", 2.0)]) == ({}, [])


async def test_a_decode_worker_with_a_prefill_worker_for_the_adapter_is_preferred(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    with_it: Any = {"info": {"loras": ("fr",)}}
    plain = Worker(checkpoint, "p0", Role.PREFILL)
    prefill = Worker(checkpoint, "p1", Role.PREFILL, **with_it)
    paired = Worker(checkpoint, "d0", Role.DECODE, prefill, **with_it)
    unpaired = Worker(checkpoint, "d1", Role.DECODE, plain, **with_it)
    for decode in (paired, unpaired):
        decode.script = says(tokenizer, ANSWER)
    async with stage(plain, prefill, paired, unpaired) as playing:
        await until_listed(playing, MODEL, "fr")
        workers = playing.fleet.models[MODEL].makers
        await playing.until(lambda: all(worker.ready_pairs for worker in workers))
        for _ in range(4):
            assert (await playing.chat(model="fr")).status_code == 200
        assert (len(paired.submits), len(unpaired.submits)) == (4, 0)
        for _ in range(4):
            assert (await playing.chat()).status_code == 200
    assert len(unpaired.submits) == 2

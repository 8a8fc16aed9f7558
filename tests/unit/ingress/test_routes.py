from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL, record
from tests.unit.ingress.fakes import FakeWorker, says
from tests.unit.ingress.stage import Stage, stage

ANSWER = "Hello 日本 🎉 world. STOP here"


def worker(checkpoint: Path, tokenizer: Tokenizer, **fields: Any) -> FakeWorker:
    return FakeWorker(record(checkpoint), says(tokenizer, ANSWER, **fields))


async def get(playing: Stage, path: str) -> tuple[int, Any]:
    response = await playing.client.get(path)
    return response.status_code, response.json()


async def test_models_are_listed_while_their_whole_chain_is_up(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = worker(checkpoint, tokenizer)
    async with stage(fake) as playing:
        status, listed = await get(playing, "/v1/models")
        assert status == 200
        assert [model["id"] for model in listed["data"]] == [MODEL]
        status, one = await get(playing, f"/v1/models/{MODEL}")
        assert (status, one) == (200, listed["data"][0])
        assert one["max_model_len"] == 512
        status, missing = await get(playing, "/v1/models/other")
        assert (status, missing["error"]["code"]) == (404, "model_not_found")
        assert (await get(playing, "/ready"))[0] == 200
        fake.refuse_connections = True
        fake.lose()
        assert (await get(playing, "/v1/models"))[1]["data"] == []
        status, unready = await get(playing, "/ready")
        assert status == 503
        assert "connection reset" in unready["missing"][MODEL]
        chat = await playing.chat()
        assert chat.status_code == 503
        assert chat.headers["retry-after"] == "1"
        assert "worker w0 is unreachable" in chat.json()["error"]["message"]
        status, health = await get(playing, "/health")
        assert status == 503
        assert health["models"][MODEL]["workers"][0]["state"] == "unreachable"
        assert (await get(playing, "/live"))[0] == 200


async def test_without_a_worker_nothing_is_ready_and_says_so(checkpoint: Path) -> None:
    async with stage(ready=False) as playing:
        status, unready = await get(playing, "/ready")
        assert (status, unready["missing"]) == (503, "no worker has registered yet")
        response = await playing.chat()
    assert response.status_code == 404
    assert "models: none yet" in response.json()["error"]["message"]


async def test_an_unknown_model_is_named_with_those_that_are_served(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        response = await playing.chat(model="gpt-9")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert error["message"] == "no model 'gpt-9' is served here; models: test/tiny"


async def test_a_model_whose_tokenizer_is_broken_says_why(tmp_path: Path) -> None:
    fake = FakeWorker(record(tmp_path / "nowhere"))
    async with stage(fake, ready=False) as playing:
        known = playing.fleet.models
        await playing.until(lambda: MODEL in known and "cannot be loaded" in known[MODEL].missing)
        response = await playing.chat()
        _, unready = await get(playing, "/ready")
    assert response.status_code == 503
    assert "no such file; the ingress needs the model's tokenizer.json" in response.text
    assert "tokenizer.json" in unready["missing"][MODEL]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/nope", 404, "unknown_url"),
        ("POST", "/v1/responses", 404, "unknown_url"),
        ("GET", "/docs", 404, "unknown_url"),
    ],
)
async def test_wrong_methods_and_paths_get_openais_error_shape(
    checkpoint: Path, tokenizer: Tokenizer, method: str, path: str, status: int, code: str
) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        response = await playing.client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]
    if status == 405:
        assert response.headers["allow"]


async def test_the_callers_request_id_is_kept_and_a_strange_one_is_not(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
        for path, request in (("/live", {}), ("/v1/chat/completions", body)):
            for given, kept in (("abc-123", True), ("x" * 200, False)):
                response = await playing.client.request(
                    "POST" if request else "GET",
                    path,
                    json=request or None,
                    headers={"x-request-id": given},
                )
                assert (response.headers["x-request-id"] == given) is kept


async def test_another_content_type_is_refused(checkpoint: Path, tokenizer: Tokenizer) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        response = await playing.client.post(
            "/v1/completions", content=b"a=b", headers={"content-type": "text/plain"}
        )
        untyped = await playing.client.post("/v1/completions", content=b"{")
    assert "is declared as text/plain; send the header" in response.json()["error"]["message"]
    assert "ends too early" in untyped.json()["error"]["message"]


async def test_a_fault_of_ours_is_a_500_with_the_request_id(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        monkeypatch.setattr(playing.fleet, "served", lambda _model: 1 / 0)
        response = await playing.chat()
        monkeypatch.undo()
        after = await playing.chat()
    error = response.json()["error"]
    assert response.status_code == 500
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["message"].startswith("internal error (ZeroDivisionError)")
    assert after.status_code == 200


async def test_requests_over_the_limit_are_told_to_come_back(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint))
    async with stage(fake, max_concurrency=1) as playing:
        first = asyncio.create_task(playing.chat())
        await fake.until(lambda: fake.submits)
        second = await playing.chat()
        fake.answer(fake.submits[0], [300])
        assert (await first).status_code == 200
        third = asyncio.create_task(playing.chat())
        await fake.until(lambda: len(fake.submits) == 2)
        fake.answer(fake.submits[1], [300])
        assert (await third).status_code == 200
    assert second.status_code == 429
    assert second.json()["error"]["code"] == "overloaded"
    assert second.headers["retry-after"] == "1"


async def test_a_request_has_a_deadline(checkpoint: Path) -> None:
    fake = FakeWorker(record(checkpoint))
    async with stage(fake, request_timeout_s=0.05) as playing:
        whole = await playing.chat()
        streamed = await playing.chat(stream=True)
    assert whole.status_code == streamed.status_code == 503
    assert "was not finished after 0.05 s" in whole.json()["error"]["message"]
    assert fake.aborted == [submit.stream for submit in fake.submits]


async def test_what_happens_is_counted(checkpoint: Path, tokenizer: Tokenizer) -> None:
    async with stage(worker(checkpoint, tokenizer, cached_tokens=4)) as playing:
        whole = (await playing.chat()).json()["usage"]
        await playing.chat(stream=True)
        await playing.chat(temperature=9)
        text = (await playing.client.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(lines[f"trtllm_launch_{name}"])

    chat = 'endpoint="/v1/chat/completions"'
    model = f'model="{MODEL}"'
    assert value(f'requests_total{{{chat},{model},status="200"}}') == 2
    assert value(f'requests_total{{{chat},model="unknown",status="400"}}') == 1
    assert value(f"in_flight_requests{{{model}}}") == 0
    assert value(f"output_tokens_total{{{model}}}") == 2 * whole["completion_tokens"]
    assert value(f"prompt_tokens_total{{{model}}}") == 2 * whole["prompt_tokens"]
    assert value(f"cached_prompt_tokens_total{{{model}}}") == 8
    assert value(f"time_to_first_token_seconds_count{{{model}}}") == 2
    assert value(f"inter_token_latency_seconds_count{{{model}}}") == 2
    assert value(f"request_seconds_count{{{chat},{model}}}") == 2
    assert value("sse_events_total") >= 10
    assert value(f'registered_workers{{{model},role="aggregated",state="ready"}}') == 1

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.harness import (
    MODEL,
    FakeWorker,
    Stage,
    events,
    record,
    says,
    stage,
    write_checkpoint,
)
from trtllm_workers.planes.messages import Submit
from trtllm_workers.types import FinishReason, TokenLogprob

ANSWER = "Hello 日本 🎉 world. STOP here"


def worker(checkpoint: Path, tokenizer: Tokenizer, **fields: Any) -> FakeWorker:
    return FakeWorker(record(checkpoint), says(tokenizer, ANSWER, **fields))


async def test_a_chat_is_answered_whole(checkpoint: Path, tokenizer: Tokenizer) -> None:
    fake = worker(checkpoint, tokenizer, cached_tokens=16)
    async with stage(fake) as playing:
        response = await playing.chat("Hi", max_tokens=100)
    said = response.json()
    assert response.status_code == 200
    assert response.headers["x-request-id"] in said["id"]
    assert said["object"] == "chat.completion"
    assert said["model"] == MODEL
    [choice] = said["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    request = fake.submits[0].request
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert request.prompt_token_ids == tokenizer.encode(prompt).ids
    num_tokens = len(tokenizer.encode(ANSWER).ids) + 1  # with the hidden eos
    assert said["usage"] == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": num_tokens,
        "total_tokens": len(request.prompt_token_ids) + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


async def test_a_chat_is_streamed_one_event_per_token(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        whole = (await playing.chat()).json()
        response = await playing.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *texts, end, usage, done = events(response)
    assert done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0]["delta"]["content"] for event in texts]
    assert "".join(pieces) == ANSWER
    assert all("\ufffd" not in piece and piece for piece in pieces)
    assert end["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in [first, *texts, end])
    assert {event["object"] for event in [first, *texts, end, usage]} == {"chat.completion.chunk"}
    assert len({event["id"] for event in [first, *texts, end, usage]}) == 1


async def test_a_stream_without_include_usage_has_no_usage_field(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        said = events(await playing.chat(stream=True))
    assert all("usage" not in event for event in said[:-1])


async def test_a_completion_is_answered_whole_and_streamed(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = worker(checkpoint, tokenizer)
    async with stage(fake) as playing:
        whole = (await playing.complete("Once", max_tokens=50)).json()
        streamed = events(await playing.complete("Once", max_tokens=50, stream=True))
        fake.script = says(tokenizer, 2 * ANSWER)
        short = (await playing.complete("Once")).json()
    assert whole["object"] == "text_completion"
    assert whole["id"].startswith("cmpl-")
    assert whole["choices"][0]["text"] == ANSWER
    texts = [event["choices"][0]["text"] for event in streamed[:-1]]
    assert "".join(texts) == ANSWER
    assert streamed[-2]["choices"][0]["finish_reason"] == "stop"
    assert short["usage"]["completion_tokens"] == 16, "OpenAI's default for completions"
    assert short["choices"][0]["finish_reason"] == "length"


async def test_several_prompts_and_choices_are_numbered_in_order(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = worker(checkpoint, tokenizer)
    async with stage(fake) as playing:
        fields: dict[str, Any] = {"n": 2, "max_tokens": 50, "seed": 3}
        said = (await playing.complete(["a", "bb"], **fields)).json()
        streamed = events(await playing.complete(["a", "bb"], stream=True, **fields))
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2, 3]
    prompts = [submit.request.prompt_token_ids for submit in fake.submits[:4]]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert said["usage"]["prompt_tokens"] == len(prompts[0]) + len(prompts[2])
    assert said["usage"]["completion_tokens"] == 4 * (len(tokenizer.encode(ANSWER).ids) + 1)
    seeds = [submit.request.sampling.seed for submit in fake.submits[:4]]
    assert seeds[0] == seeds[2] == 3 != seeds[1] == seeds[3]
    texts: dict[int, str] = {}
    for event in streamed[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == dict.fromkeys(range(4), ANSWER)
    assert len({submit.stream for submit in fake.submits}) == 8


async def test_token_ids_are_a_prompt(checkpoint: Path, tokenizer: Tokenizer) -> None:
    fake = worker(checkpoint, tokenizer)
    async with stage(fake) as playing:
        assert (await playing.complete([5, 6, 7])).status_code == 200
        too_large = await playing.complete([5, 400])
        negative = await playing.complete([[5], [-1]])
        empty = await playing.complete("")
    assert fake.submits[0].request.prompt_token_ids == [5, 6, 7]
    assert too_large.json()["error"]["message"] == (
        "prompt: 400 is no token id; the vocabulary has 400"
    )
    assert negative.status_code == 400
    assert empty.json()["error"]["param"] == "prompt"


async def test_echo_returns_the_prompt_before_the_answer(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    async with stage(worker(checkpoint, tokenizer)) as playing:
        whole = (await playing.complete("Once ", echo=True, max_tokens=50)).json()
        streamed = events(await playing.complete("Once ", echo=True, max_tokens=50, stream=True))
    assert whole["choices"][0]["text"] == "Once " + ANSWER
    assert "".join(event["choices"][0]["text"] for event in streamed[:-1]) == "Once " + ANSWER


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop": "STOP"}, "Hello 日本 🎉 world. "),
        ({"stop": ["nothing", " wor", "STOP"]}, "Hello 日本 🎉"),
        ({"stop": "STOP", "include_stop_str_in_output": True}, "Hello 日本 🎉 world. STOP"),
        ({"stop": "本"}, "Hello 日"),
        ({"stop": "STOPPED"}, ANSWER),
        ({"stop": "herewith"}, ANSWER),
    ],
)
async def test_stop_strings_end_the_answer_across_token_borders(
    checkpoint: Path,
    tokenizer: Tokenizer,
    streamed: bool,
    fields: dict[str, Any],
    expected: str,
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids

    def without_end(fake: FakeWorker, submit: Submit) -> None:
        fake.chunk(submit.stream, token_ids[:1])
        for token_id in token_ids[1:]:
            fake.token(submit.stream, token_id)
        if expected == ANSWER:
            fake.end(submit.stream)

    fake = FakeWorker(record(checkpoint), without_end)
    async with stage(fake) as playing:
        options = {"include_usage": True} if streamed else None
        response = await playing.chat(stream=streamed, stream_options=options, **fields)
    if streamed:
        _, *texts, end, usage, _done = events(response)
        text = "".join(event["choices"][0]["delta"]["content"] for event in texts)
        reason, counted = end["choices"][0]["finish_reason"], usage["usage"]
    else:
        [choice] = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        counted = response.json()["usage"]
    assert text == expected
    assert reason == "stop"
    if expected != ANSWER:
        # Tokens up to and including the one that completed the stop string, and no more.
        shown = expected + ("STOP" if fields["stop"] == "STOP" else "")
        shown = shown.replace("STOPSTOP", "STOP")
        enough = next(
            count
            for count in range(len(token_ids) + 1)
            if any(
                stop in tokenizer.decode(token_ids[:count])
                for stop in (
                    [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
                )
            )
        )
        assert counted["completion_tokens"] == enough
        assert fake.aborted == [fake.submits[0].stream], "the engine is told at once"
    else:
        assert fake.aborted == []


def scored(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[TokenLogprob]]:
    token_ids = tokenizer.encode(text).ids
    return token_ids, [
        TokenLogprob(token_id, -0.25 * at, [(token_id, -0.25 * at), (token_ids[0], -9.0)])
        for at, token_id in enumerate(token_ids)
    ]


def scores(tokenizer: Tokenizer, text: str) -> Any:
    def script(fake: FakeWorker, submit: Submit) -> None:
        for token_id, logprob in zip(*scored(tokenizer, text), strict=True):
            fake.chunk(submit.stream, [token_id], logprobs=(logprob,))
        fake.end(submit.stream, FinishReason.LENGTH)

    return script


async def test_chat_logprobs_have_openais_shape(checkpoint: Path, tokenizer: Tokenizer) -> None:
    text = "Hi 🦊 you"
    token_ids, _ = scored(tokenizer, text)
    async with stage(FakeWorker(record(checkpoint), scores(tokenizer, text))) as playing:
        whole = (await playing.chat(logprobs=True, top_logprobs=2)).json()
        streamed = events(await playing.chat(logprobs=True, top_logprobs=2, stream=True))
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == len(token_ids)
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == text
    assert content[1]["logprob"] == -0.25
    assert [entry["logprob"] for entry in content[1]["top_logprobs"]] == [-0.25, -9.0]
    assert content[0]["token"] == bytes(content[0]["bytes"]).decode()
    told = [
        token
        for event in streamed[1:-1]
        for token in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert told == content
    texts = [event["choices"][0]["delta"].get("content", "") for event in streamed[:-1]]
    assert "".join(texts) == text


async def test_completion_logprobs_have_openais_shape(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    text = "Hi 日 you"
    token_ids, _ = scored(tokenizer, text)
    async with stage(FakeWorker(record(checkpoint), scores(tokenizer, text))) as playing:
        said = (await playing.complete(logprobs=2, max_tokens=20)).json()
    logprobs = said["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(token_ids)
    assert logprobs["token_logprobs"] == [-0.25 * at for at in range(len(token_ids))]
    assert logprobs["text_offset"][0] == 0
    last = logprobs["text_offset"][-1]
    assert text[last:] == logprobs["tokens"][-1]
    assert logprobs["top_logprobs"][0]


async def test_logprobs_behind_a_stop_string_are_not_told(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint), scores(tokenizer, "Hello STOP here"))
    async with stage(fake) as playing:
        said = (await playing.chat(logprobs=True, stop="STOP")).json()
    content = said["choices"][0]["logprobs"]["content"]
    shown = bytes(byte for token in content for byte in token["bytes"]).decode()
    assert said["choices"][0]["message"]["content"] == "Hello "
    assert "OP" not in shown
    assert shown.startswith("Hello")


async def test_special_tokens_are_shown_when_asked_for(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, "a<|im_start|>b"))
    async with stage(fake) as playing:
        hidden = (await playing.chat()).json()
        shown = (await playing.chat(skip_special_tokens=False)).json()
        streamed = events(await playing.chat(skip_special_tokens=False, stream=True))
    assert hidden["choices"][0]["message"]["content"] == "ab"
    assert shown["choices"][0]["message"]["content"] == "a<|im_start|>b"
    texts = [event["choices"][0]["delta"].get("content", "") for event in streamed[:-1]]
    assert "".join(texts) == "a<|im_start|>b"


async def test_prompt_and_max_tokens_over_the_context_are_refused_with_the_numbers(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint, max_seq_len=32), says(tokenizer, ANSWER))
    async with stage(fake) as playing:
        over = (await playing.complete([5] * 20, max_tokens=13)).json()["error"]
        exact = await playing.complete([5] * 20, max_tokens=12)
        default = (await playing.complete([5] * 25)).json()
        full = (await playing.complete([5] * 32)).json()["error"]
        chat = await playing.chat()
    assert over["code"] == full["code"] == "context_length_exceeded"
    assert over["message"] == (
        "the prompt has 20 tokens and max_tokens is 13: together 33, but this model's context is "
        "32; shorten the prompt or ask for at most 12"
    )
    assert exact.status_code == 200
    assert default["usage"]["completion_tokens"] == 7, "the default is cut to what is left"
    assert "the prompt has 32 tokens" in full["message"]
    prompt = chat.json()["usage"]["prompt_tokens"]
    assert fake.submits[-1].request.sampling.max_tokens == 32 - prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": [400]}, "stop_token_ids"),
        ({"logit_bias": {"400": 1}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Eva"}]}, "messages[0].name"),
        (
            {"continue_final_message": True, "messages": [{"role": "user", "content": " "}]},
            "continue_final_message",
        ),
    ],
)
async def test_what_only_the_model_can_judge_is_refused_by_name(
    checkpoint: Path, tokenizer: Tokenizer, fields: dict[str, Any], param: str
) -> None:
    fake = worker(checkpoint, tokenizer)
    async with stage(fake) as playing:
        response = await playing.chat(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert fake.submits == []


async def test_a_developer_message_is_a_system_message_for_older_templates(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = worker(checkpoint, tokenizer)
    async with stage(fake) as playing:
        await playing.chat(messages=[{"role": "developer", "content": "Be brief."}])
    prompt = tokenizer.decode(fake.submits[0].request.prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")


async def test_an_answer_can_continue_the_final_message(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = worker(checkpoint, tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer"}]
    async with stage(fake) as playing:
        await playing.chat(messages=messages, continue_final_message=True)
    prompt = tokenizer.decode(fake.submits[0].request.prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nThe answer")


async def test_a_model_without_a_chat_template_completes_only(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = write_checkpoint(tmp_path, tokenizer, chat_template=None)
    async with stage(FakeWorker(record(folder), says(tokenizer, ANSWER))) as playing:
        chat = await playing.chat()
        completion = await playing.complete()
    assert chat.status_code == 400
    assert "has no chat template; use /v1/completions" in chat.json()["error"]["message"]
    assert completion.status_code == 200


async def test_a_sentencepiece_model_is_answered_through_its_own_decoder(
    metaspace_checkpoint: Path, metaspace: Tokenizer
) -> None:
    text = "the quick 🦊 dog"
    fake = FakeWorker(record(metaspace_checkpoint, vocab_size=500), says(metaspace, text))
    async with stage(fake) as playing:
        chat = (await playing.chat(max_tokens=100)).json()
        streamed = events(await playing.chat(max_tokens=100, stream=True))
        completion = (await playing.complete("Hello", max_tokens=100)).json()
    assert chat["choices"][0]["message"]["content"] == text
    pieces = [event["choices"][0]["delta"].get("content", "") for event in streamed[:-1]]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert completion["choices"][0]["text"] == " " + text, "it continues the prompt's text"
    assert completion["usage"]["prompt_tokens"] == len(metaspace.encode("Hello").ids)


async def test_a_sampling_field_no_worker_honours_is_refused_by_name(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint, capabilities=("temperature",)), says(tokenizer, ANSWER))
    async with stage(fake) as playing:
        response = await playing.chat(temperature=0, top_k=5)
        honoured = await playing.chat(temperature=0, top_k=0)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "top_k")
    assert error["code"] == "unsupported_parameter"
    assert error["message"] == "'top_k' is not supported by the engine that serves 'test/tiny'"
    assert honoured.status_code == 200


async def test_the_cache_salt_and_template_variables_are_passed_on(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = write_checkpoint(tmp_path, tokenizer, "{{ mood }}: {{ messages[0].content }}")
    fake = FakeWorker(record(folder), says(tokenizer, ANSWER))
    async with stage(fake) as playing:
        await playing.chat(cache_salt="tenant", chat_template_kwargs={"mood": "calm"})
    request = fake.submits[0].request
    assert request.cache_salt == "tenant"
    assert tokenizer.decode(request.prompt_token_ids) == "calm: Hi"


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

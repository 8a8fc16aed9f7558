from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL, record, write_checkpoint
from tests.unit.ingress.fakes import FakeWorker, says
from tests.unit.ingress.stage import events, stage

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

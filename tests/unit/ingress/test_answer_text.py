from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import record
from tests.unit.ingress.fakes import FakeWorker, says
from tests.unit.ingress.stage import events, stage
from trtllm_workers.planes.messages import Submit
from trtllm_workers.types import FinishReason, TokenLogprob

ANSWER = "Hello 日本 🎉 world. STOP here"


def worker(checkpoint: Path, tokenizer: Tokenizer, **fields: Any) -> FakeWorker:
    return FakeWorker(record(checkpoint), says(tokenizer, ANSWER, **fields))


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

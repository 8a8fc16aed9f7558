"""A newcomer's first minutes: the demo model over HTTP, with the real openai client and by hand."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

QUESTION = "What is prefill?"


def chat(client: openai.OpenAI, **body: Any) -> Any:
    """Ask for a chat completion; the client's own types do not fit bodies made piece by piece."""
    return client.chat.completions.create(**body)


@pytest.fixture
def client(served: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=30)


def test_the_demo_model_answers_sensibly(client: openai.OpenAI) -> None:
    answer = chat(
        client, model="demo", messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    text = answer.choices[0].message.content or ""
    assert "prompt" in text.lower()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 5


def test_a_stream_is_the_same_answer_in_pieces_with_usage(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    whole = chat(client, model="demo", messages=messages, temperature=0)
    stream = chat(
        client,
        model="demo",
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage, reasons = "", None, []
    for event in stream:
        usage = event.usage or usage
        for choice in event.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
    assert text == whole.choices[0].message.content
    assert [reason for reason in reasons if reason] == ["stop"]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_second_turn_takes_the_first_from_the_cache(client: openai.OpenAI) -> None:
    history = [{"role": "user", "content": "What is decode? " * 12}]
    first = chat(client, model="demo", messages=history, max_tokens=16)
    history += [
        {"role": "assistant", "content": first.choices[0].message.content or ""},
        {"role": "user", "content": "And what is a block?"},
    ]
    second = chat(client, model="demo", messages=history, max_tokens=4)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 32


def test_completions_take_text_and_token_ids_alike(client: openai.OpenAI) -> None:
    by_text = client.completions.create(
        model="demo", prompt="Q: What is", max_tokens=6, temperature=0
    )
    assert by_text.choices[0].text
    several = client.completions.create(
        model="demo", prompt=["Q: What is", "Q: Who"], max_tokens=6, temperature=0
    )
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == by_text.choices[0].text


def test_n_answers_with_a_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        made = chat(
            client,
            model="demo",
            messages=[{"role": "user", "content": "Tell me something"}],
            n=3,
            seed=7,
            temperature=1.5,
            max_tokens=12,
        )
        return [choice.message.content or "" for choice in made.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) > 1


def test_logprobs_come_in_openais_shape(client: openai.OpenAI) -> None:
    made = chat(
        client,
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        logprobs=True,
        top_logprobs=2,
        max_tokens=4,
        temperature=0,
    )
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 4
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token  # greedy


def test_a_stop_string_ends_the_answer_before_itself(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    whole = chat(client, model="demo", messages=messages, temperature=0)
    text = whole.choices[0].message.content or ""
    stop = text[10:14]
    cut = chat(
        client,
        model="demo",
        messages=messages,
        temperature=0,
        stop=[stop],
    )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_greedy_answers_do_not_depend_on_what_else_runs(served: str) -> None:
    def body(question: str) -> dict[str, object]:
        messages = [{"role": "user", "content": question}]
        return {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24}

    questions = [
        f"What is {word}?" for word in ("prefill", "a block", "NIXL", "UCX", "MPI", "TTFT")
    ]
    with httpx.Client(base_url=served, timeout=30) as http:
        alone = [http.post("/v1/chat/completions", json=body(q)).json() for q in questions]

    async def together() -> list[dict[str, object]]:
        async with httpx.AsyncClient(base_url=served, timeout=60) as http:
            posts = [http.post("/v1/chat/completions", json=body(q)) for q in questions * 4]
            return [response.json() for response in await asyncio.gather(*posts)]

    texts = [answer["choices"][0]["message"]["content"] for answer in alone]
    for index, answer in enumerate(asyncio.run(together())):
        choices = answer["choices"]
        assert isinstance(choices, list)
        assert choices[0]["message"]["content"] == texts[index % len(texts)]


def test_models_health_and_metrics_tell_what_is_served(client: openai.OpenAI, served: str) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    with httpx.Client(base_url=served, timeout=10) as http:
        for path in ("/live", "/ready", "/health"):
            assert http.get(path).status_code == 200, path
        metrics = http.get("/metrics").text
    for name in (
        "trtllm_launch_requests_total",
        "trtllm_launch_time_to_first_token_seconds_bucket",
        "trtllm_launch_output_tokens_total",
    ):
        assert name in metrics


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        (b'{"model": "demo", "messages": [}', 400, "JSON"),
        (b'{"model": "demo", "messages": "hello"}', 400, "messages"),
        (b'{"model": "demo", "messages": []}', 400, "messages"),
        (b'{"model": "nope", "messages": [{"role": "user", "content": "x"}]}', 404, "nope"),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99999}',
            400,
            "99999",
        ),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "temperature": -1}',
            400,
            "temperature",
        ),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "top_p": NaN}',
            400,
            "JSON",
        ),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "tempratur": 1}',
            400,
            "temperature",
        ),
        (
            b'{"model": "demo", "messages": [{"role": "user", "content": "x"}],'
            b' "tools": [{"type": "function", "function": {"name": "f"}}]}',
            400,
            "tools",
        ),
    ],
)
def test_bad_requests_are_refused_in_openais_shape(
    served: str, body: bytes, status: int, names: str
) -> None:
    with httpx.Client(base_url=served, timeout=10) as http:
        response = http.post(
            "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert names in error["message"] or names == error["param"]


def test_a_body_of_100_megabytes_is_refused_unread(served: str) -> None:
    pieces = [b'{"model": "demo", "messages": [{"role": "user", "content": "']
    pieces += [b"x" * 1_000_000] * 100 + [b'"}]}']
    size = sum(len(piece) for piece in pieces)
    length = {"Content-Length": str(size), "Content-Type": "application/json"}
    with httpx.Client(base_url=served, timeout=30) as http:
        try:
            response = http.post("/v1/chat/completions", content=iter(pieces), headers=length)
        except httpx.WriteError:
            return  # refused while it was still being sent
    assert response.status_code == 413
    assert "bytes" in response.json()["error"]["message"]


def test_the_wrong_method_and_the_wrong_path_are_errors_of_the_same_shape(served: str) -> None:
    with httpx.Client(base_url=served, timeout=10) as http:
        assert http.get("/v1/chat/completions").status_code == 405
        missing = http.get("/v1/nothing")
    assert missing.status_code == 404
    assert json.loads(missing.text)["error"]["message"]

"""Chats with images: who encodes them, what workers get, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import CHATML, MODEL, record
from tests.unit.ingress.fakes import FakeWorker, says
from tests.unit.ingress.raw_http import on_uvloop
from tests.unit.ingress.stage import events, http_stage, stage, text_of
from tests.unit.ingress.vision import (
    BOTH,
    CAT,
    DOG,
    PARTS_ONLY,
    PLACEHOLDER,
    Seer,
    body,
    expanded,
    image,
    rendered,
    see,
    text,
    until,
    user,
    vision_checkpoint,
    vision_info,
)
from trtllm_workers.ingress.settings import RouterSettings
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.types import MediaReference, Role

ANSWER = "Hello world."
ONE = rendered("Look: ", PLACEHOLDER, " What is it?")


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_checkpoint(tmp_path_factory.mktemp("vision"))


def seers(seeing: Path, tokenizer: Tokenizer, count: int = 1, **fields: Any) -> list[Seer]:
    script = says(tokenizer, ANSWER, cached_tokens=2)
    found = [Seer(seeing, f"w{at}", **fields) for at in range(count)]
    for one in found:
        one.script = script
    return found


@pytest.mark.parametrize("template", [PARTS_ONLY, BOTH])
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_image_takes_its_place_in_the_prompt(
    tmp_path: Path, tokenizer: Tokenizer, template: str, streamed: bool
) -> None:
    [worker] = seers(vision_checkpoint(tmp_path, template), tokenizer, num_tokens=5)
    async with stage(worker) as playing:
        fields: dict[str, Any] = {"stream_options": {"include_usage": True}} if streamed else {}
        response = await see(playing, CAT, stream=streamed, **fields)
        await worker.until_done()
    [ask], [submit] = worker.asks, worker.submits
    assert ask.references == [MediaReference(CAT, "messages[0].content[1].image_url")]
    assert 0 < ask.timeout_s <= 60
    request = submit.request
    assert request.prompt_text == ONE
    assert request.prompt_token_ids == expanded(ONE, 5)
    [item] = request.media
    assert item.holder == worker.record.address
    placed = request.prompt_token_ids[item.offset : item.offset + item.num_tokens]
    assert placed == [vision_info().image_token_id] * 5
    if streamed:
        assert text_of(response) == ANSWER
        usage = events(response)[-2]["usage"]
    else:
        assert response.json()["choices"][0]["message"]["content"] == ANSWER
        usage = response.json()["usage"]
    assert usage["prompt_tokens"] == len(request.prompt_token_ids)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_several_images_in_several_messages_keep_order_and_roles(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    [worker] = seers(seeing, tokenizer)
    messages = [
        {"role": "system", "content": "Be brief."},
        user(image(CAT), text("and"), image(f"{DOG}#2")),
        {"role": "assistant", "content": [text("A cat.")]},
        {"role": "user", "content": [{"type": "image_url", "image_url": CAT}]},
    ]
    async with stage(worker) as playing:
        response = await playing.client.post("/v1/chat/completions", json=body(*messages, n=2))
    assert response.status_code == 200, response.text
    one = PLACEHOLDER
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{one}and{one}{one}<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        f"<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [one.url for one in worker.asks[0].references] == [CAT, f"{DOG}#2", CAT]
    assert len(worker.submits) == 2
    for submit in worker.submits:
        assert submit.request.prompt_text == prompt
        assert submit.request.prompt_token_ids == expanded(prompt, 3, 3, 3, 3)
        digests = [one.digest for one in submit.request.media]
        assert digests[0] == digests[3]
        assert len(set(digests)) == 3
        offsets = [one.offset for one in submit.request.media]
        assert offsets == sorted(set(offsets))


@pytest.mark.parametrize("template", [PARTS_ONLY, BOTH, CHATML])
@pytest.mark.parametrize("content", ["Hi there", [text("Hi "), text("there")]])
async def test_text_alone_goes_as_ever(
    tmp_path: Path, tokenizer: Tokenizer, template: str, content: Any
) -> None:
    [worker] = seers(vision_checkpoint(tmp_path, template), tokenizer)
    async with stage(worker) as playing:
        message = {"role": "user", "content": content}
        response = await playing.client.post("/v1/chat/completions", json=body(message))
    assert response.status_code == 200, response.text
    [submit] = worker.submits
    assert submit.request.prompt_token_ids == expanded(rendered("Hi there"))
    assert submit.request.media == ()
    assert submit.request.prompt_text == ""
    assert not worker.asks


@pytest.mark.parametrize("template", [PARTS_ONLY, BOTH])
async def test_a_message_with_an_image_can_be_continued(
    tmp_path: Path, tokenizer: Tokenizer, template: str
) -> None:
    [worker] = seers(vision_checkpoint(tmp_path, template), tokenizer)
    messages = [user(image(CAT)), {"role": "assistant", "content": [text("A c")]}]
    async with stage(worker) as playing:
        response = await playing.client.post(
            "/v1/chat/completions", json=body(*messages, continue_final_message=True)
        )
        refused = await playing.client.post(
            "/v1/chat/completions", json=body(user(image(CAT)), continue_final_message=True)
        )
        await worker.until_done()
    assert response.status_code == 200, response.text
    assert worker.submits[0].request.prompt_text == (
        f"<|im_start|>user\n{PLACEHOLDER}<|im_end|>\n<|im_start|>assistant\nA c"
    )
    assert refused.json()["error"]["param"] == "continue_final_message"


async def test_concurrent_requests_never_share_their_images(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    workers = seers(seeing, tokenizer, 2, waits=True)
    async with stage(*workers) as playing:
        urls = [f"http://images.test/{at}.png" for at in range(8)]
        asked = [asyncio.create_task(see(playing, url)) for url in urls]
        await until(lambda: sum(len(one.asks) for one in workers) == len(urls), *workers)
        for worker in reversed(workers):
            for ask in reversed(worker.asks):
                worker.encode(ask)
        assert [(await one).status_code for one in asked] == [200] * len(urls)
        by_url = {ask.references[0].url: (worker, ask) for worker in workers for ask in worker.asks}
        assert set(by_url) == set(urls)
        got = [one.request.media[0] for worker in workers for one in worker.submits]
    assert len({item.digest for item in got}) == len(urls)
    for item in got:
        [url] = [url for url in urls if item.digest == digest_of(url)]
        assert item.holder == by_url[url][0].record.address


def digest_of(url: str) -> bytes:
    return blake2b(f"{url} 0".encode(), digest_size=16).digest()


async def test_encode_workers_encode_when_there_are_any(seeing: Path, tokenizer: Tokenizer) -> None:
    encoders = [Seer(seeing, f"e{at}", Role.ENCODE) for at in range(3)]
    [worker] = seers(seeing, tokenizer)
    async with stage(worker, *encoders) as playing:
        await playing.until(lambda: len(playing.fleet.models[MODEL].encoders()) == 3)
        for at in range(12):
            for _ in range(3):
                assert (await see(playing, f"http://images.test/{at}")).status_code == 200
        listed = (await playing.client.get("/v1/models")).json()["data"]
        ready = await playing.client.get("/ready")
        health = (await playing.client.get("/health")).json()
        metrics = (await playing.client.get("/metrics")).text
    assert not worker.asks
    homes = {
        url: {one.record.worker_id for one in encoders for ask in one.asks if asks(ask, url)}
        for url in (f"http://images.test/{at}" for at in range(12))
    }
    assert all(len(home) == 1 for home in homes.values()), "an image has a home"
    assert len(set.union(*homes.values())) > 1, "and not all of them the same"
    assert listed[0]["max_model_len"] == 512, "encode workers have no say in it"
    assert ready.json() == {"status": "ready"}
    assert {one["role"] for one in health["models"][MODEL]["workers"]} == {"aggregated", "encode"}
    assert 'registered_workers{model="test/tiny",role="encode",state="ready"} 3' in metrics
    assert 'trtllm_launch_image_items_count{model="test/tiny"} 36' in metrics
    assert 'image_encode_seconds_count{model="test/tiny",outcome="ok"} 36' in metrics
    assert 'image_cached_items_total{model="test/tiny"} 36' in metrics


def asks(ask: Any, url: str) -> bool:
    return bool(ask.references[0].url == url)


async def test_an_image_goes_elsewhere_when_its_home_has_far_more_to_do(seeing: Path) -> None:
    encoders = [Seer(seeing, f"e{at}", Role.ENCODE, waits=True) for at in range(2)]
    worker = Seer(seeing, "w0")
    async with stage(worker, *encoders) as playing:
        await playing.until(lambda: len(playing.fleet.models[MODEL].encoders()) == 2)
        calls = [playing.call(messages=[user(image(CAT))]) for _ in range(8)]
        await until(lambda: sum(len(one.asks) for one in encoders) == 8, *encoders)
        for call in calls:
            call.left.set()
            await call.result()
        for one in encoders:
            await one.until_done()
    assert sorted(len(one.asks) for one in encoders) == [2, 6]


@pytest.mark.parametrize(
    ("part", "param", "code", "says_so"),
    [
        ({"image_url": {"url": ""}}, ".image_url.url", "invalid_value", "is empty"),
        ({"image_url": {}}, ".image_url.url", "invalid_value", "is missing"),
        ({"image_url": None}, ".image_url", "invalid_value", "is missing"),
        ({"image_url": 7}, ".image_url", "invalid_value", "must be"),
        ({"image_url": {"url": 7}}, ".image_url.url", "invalid_value", "must be text"),
        ({"image_url": {"url": "h" * 8193}}, ".image_url.url", "invalid_value", "8193"),
        (
            {"image_url": {"url": CAT, "detial": "auto"}},
            ".image_url.detial",
            "invalid_value",
            "did you mean 'detail'",
        ),
        (
            {"image_url": {"url": CAT, "detail": "high"}},
            ".image_url.detail",
            "unsupported_parameter",
            "'high' is not supported",
        ),
        (
            {"image_url": {"url": CAT, "detail": "huge"}},
            ".image_url.detail",
            "invalid_value",
            "must be 'auto'",
        ),
        ({"image_url": {"url": CAT}, "text": "a cat"}, ".text", "invalid_value", "part of its own"),
        (
            {"type": "text", "text": "a cat", "image_url": {"url": CAT}},
            ".image_url",
            "invalid_value",
            "part of its own",
        ),
        ({"type": "image", "image_url": {"url": CAT}}, ".type", "invalid_value", "'image_url'"),
        ({"type": "input_audio"}, ".type", "unsupported_parameter", "not supported"),
        ({"type": "file"}, ".type", "unsupported_parameter", "not supported"),
        ({"type": "video_url"}, ".type", "unsupported_parameter", "not supported"),
    ],
)
async def test_a_part_at_fault_is_named(
    seeing: Path, part: dict[str, Any], param: str, code: str, says_so: str
) -> None:
    worker = Seer(seeing, "w0")
    async with stage(worker) as playing:
        message = user(text("Hi"), {"type": "image_url", **part})
        response = await playing.client.post("/v1/chat/completions", json=body(message))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == f"messages[0].content[1]{param}"
    assert error["code"] == code
    assert says_so in error["message"]
    assert not worker.asks


async def test_detail_auto_and_long_data_urls_are_taken(seeing: Path, tokenizer: Tokenizer) -> None:
    [worker] = seers(seeing, tokenizer)
    url = "data:image/png;base64," + "A" * 100_000
    async with stage(worker) as playing:
        for detail in ("auto", None):
            part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
            posted = await playing.client.post("/v1/chat/completions", json=body(user(part)))
            assert posted.status_code == 200, posted.text
    assert worker.asks[0].references[0].url == url


async def test_more_images_than_any_worker_takes_are_refused_at_once(seeing: Path) -> None:
    worker = Seer(seeing, "w0")
    async with stage(worker) as playing:
        response = await see(playing, *[CAT] * 257)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[257].image_url"
    assert not worker.asks


@pytest.mark.parametrize("encoder_too", [False, True])
async def test_a_text_only_model_refuses_images_by_name(
    checkpoint: Path, tokenizer: Tokenizer, encoder_too: bool
) -> None:
    worker = FakeWorker(record(checkpoint), says(tokenizer, ANSWER))
    others = [Seer(checkpoint, "e0", Role.ENCODE)] if encoder_too else []
    async with stage(worker, *others) as playing:
        response = await see(playing, CAT)
        assert (await playing.chat(f"What is {PLACEHOLDER}?")).status_code == 200
    assert response.status_code == 400
    error = response.json()["error"]
    assert error == {
        "message": f"model '{MODEL}' takes text only",
        "type": "invalid_request_error",
        "param": "messages[0].content[1].image_url",
        "code": "unsupported_parameter",
    }
    assert len(worker.submits) == 1


async def test_only_workers_that_know_images_get_them(seeing: Path, tokenizer: Tokenizer) -> None:
    blind = FakeWorker(record(seeing, "b0", vocab_size=401), says(tokenizer, ANSWER))
    [worker] = seers(seeing, tokenizer)
    async with stage(blind, worker) as playing:
        await playing.until(lambda: len(playing.fleet.models[MODEL].workers) == 2)
        await playing.until(lambda: playing.fleet.models[MODEL].encoders())
        for _ in range(4):
            assert (await see(playing, CAT)).status_code == 200
    assert len(worker.submits) == 4
    assert not blind.submits


@pytest.mark.parametrize("template", [CHATML, None])
async def test_a_template_without_a_place_for_images_says_so(
    tmp_path: Path, tokenizer: Tokenizer, template: str | None
) -> None:
    [worker] = seers(vision_checkpoint(tmp_path, template), tokenizer)
    async with stage(worker) as playing:
        response = await see(playing, CAT)
    assert response.status_code == 400
    error = response.json()["error"]
    assert "chat template" in error["message"]
    assert error["param"] == "messages[0].content[1].image_url"
    assert not worker.asks, "nobody looked at the image in vain"


async def test_an_image_where_the_template_takes_none_is_not_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    users_only = PARTS_ONLY.replace(
        "part.type == 'image'", "part.type == 'image' and message.role == 'user'"
    )
    [worker] = seers(vision_checkpoint(tmp_path, users_only), tokenizer)
    async with stage(worker) as playing:
        response = await playing.client.post(
            "/v1/chat/completions",
            json=body({"role": "system", "content": [image(CAT)]}, user(text("Hi"))),
        )
        await worker.until_done()
    assert response.status_code == 400
    error = response.json()["error"]
    assert "0 placeholders" in error["message"]
    assert error["param"] == "messages[0].content[0].image_url"
    assert not worker.submits


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [user(text("Hi"), text(f"an {PLACEHOLDER}"))]}, "messages[0].content"),
        ({"messages": [user(text("an <im"), text("age>"))]}, "messages[0].content"),
        (
            {"messages": [{"role": "system", "content": PLACEHOLDER}, user(image(CAT))]},
            "messages[0].content",
        ),
        (
            {"messages": [user(image(CAT))], "chat_template_kwargs": {"x": [{"y": PLACEHOLDER}]}},
            "chat_template_kwargs",
        ),
        ({"prompt": f"an {PLACEHOLDER}"}, "prompt"),
        ({"prompt": ["a", PLACEHOLDER]}, "prompt"),
        ({"prompt": [5, 400, 7]}, "prompt"),
    ],
)
async def test_a_placeholder_in_a_text_becomes_no_image(
    seeing: Path, fields: dict[str, Any], param: str
) -> None:
    assert vision_info().image_token_id == 400
    worker = Seer(seeing, "w0")
    path = "/v1/completions" if "prompt" in fields else "/v1/chat/completions"
    async with stage(worker) as playing:
        response = await playing.client.post(path, json={"model": MODEL, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "stands for an image" in error["message"]
    assert not worker.asks
    assert not worker.submits


async def test_what_images_add_to_a_prompt_that_is_too_long_is_told(seeing: Path) -> None:
    worker = Seer(seeing, "w0", num_tokens=600)
    async with stage(worker) as playing:
        long = await see(playing, CAT)
        worker.num_tokens = 100
        many = await see(playing, CAT, max_tokens=500)
        await worker.until_done()
    assert (
        "tokens, of which 600 stand for images, and this model's" in long.json()["error"]["message"]
    )
    assert (
        "tokens, of which 100 stand for images, and max_tokens" in many.json()["error"]["message"]
    )
    assert long.json()["error"]["code"] == "context_length_exceeded"


async def test_requests_with_equal_images_go_where_their_prefix_is(
    seeing: Path, tokenizer: Tokenizer
) -> None:
    workers = seers(seeing, tokenizer, 2, num_tokens=64)
    router = RouterSettings(RouterMode.KV, uses_events=False)
    async with stage(*workers, router=router) as playing:
        for _ in range(3):
            assert (await see(playing, CAT)).status_code == 200
        about = user(text("Look: "), image(CAT), text(" What is it?"))
        same = await playing.client.post("/router/explain", json=body(about))
        about = user(text("Look: "), image(DOG), text(" What is it?"))
        other = await playing.client.post("/router/explain", json=body(about))
        for worker in workers:
            await worker.until_done()
    assert {len(worker.submits) for worker in workers} == {0, 3}
    assert same.json()["maker"]["overlap_tokens"] >= 64
    assert other.json()["maker"]["overlap_tokens"] < 16


async def test_a_handle_of_an_engine_stays_on_its_host(seeing: Path, tokenizer: Tokenizer) -> None:
    far, near = seers(seeing, tokenizer, 2)
    elsewhere = msgspec.structs.replace(far.record.address, host="10.0.0.9")
    far.record = msgspec.structs.replace(far.record, address=elsewhere)
    encoder = Seer(seeing, "e0", Role.ENCODE)
    encoder.native = b"handle"
    async with stage(far, near, encoder) as playing:
        await playing.until(lambda: len(playing.fleet.models[MODEL].workers) == 3)
        await playing.until(lambda: playing.fleet.models[MODEL].encoders()[0].role is Role.ENCODE)
        for _ in range(4):
            assert (await see(playing, CAT)).status_code == 200
        encoder.native = b""
        for _ in range(4):
            assert (await see(playing, CAT)).status_code == 200
    assert len(far.submits) == 2
    assert len(near.submits) == 6


@asynccontextmanager
async def openai_client(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://127.0.0.1:{port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=10) as one:
        yield one


@on_uvloop
async def test_the_openai_client_shows_images(seeing: Path, tokenizer: Tokenizer) -> None:
    [worker] = seers(seeing, tokenizer)
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        user(
            text("What is it?"), {"type": "image_url", "image_url": {"url": CAT, "detail": "auto"}}
        ),
    ]
    async with http_stage(worker) as (_, port), openai_client(port) as client:
        whole = await client.chat.completions.create(
            model=MODEL, messages=messages, n=2, logprobs=False
        )
        stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        with pytest.raises(openai.BadRequestError, match="did you mean 'url'"):
            await client.chat.completions.create(
                model=MODEL,
                messages=[user({"type": "image_url", "image_url": {"ur": CAT}})],  # type: ignore[list-item]
            )
        await worker.until_done()
    assert [choice.message.content for choice in whole.choices] == [ANSWER, ANSWER]
    assert said == ANSWER
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(worker.submits[0].request.prompt_token_ids)

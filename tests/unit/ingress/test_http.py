"""The ingress behind its real HTTP server."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pydantic
import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL, record
from tests.unit.ingress.fakes import FakeWorker, says
from tests.unit.ingress.raw_http import (
    MESSAGES,
    chat_body,
    connection,
    on_uvloop,
    read_chunks,
    read_head,
    read_response,
    request,
)
from tests.unit.ingress.stage import http_stage
from trtllm_workers.ingress.exchange import Exchange
from trtllm_workers.planes.messages import Submit
from trtllm_workers.types import FinishReason, GuidedKind

ANSWER = "Hello 日本 🎉 world. STOP here and there."


@asynccontextmanager
async def openai_client(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"http://127.0.0.1:{port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=10) as one:
        yield one


@on_uvloop
async def test_the_openai_client_chats(checkpoint: Path, tokenizer: Tokenizer) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, ANSWER, cached_tokens=7))
    async with http_stage(fake) as (_, port), openai_client(port) as client:
        whole = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, seed=1, n=2, stop=["nothing"]
        )
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=200,
        )
        chunks = [chunk async for chunk in stream]
        stopped = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stop="STOP", stream=True
        )
        texts = [chunk.choices[0].delta.content async for chunk in stopped]
    assert [choice.message.content for choice in whole.choices] == [ANSWER, ANSWER]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 7
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens * 2 == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert "".join(text or "" for text in texts) == "Hello 日本 🎉 world. "


@on_uvloop
async def test_the_openai_client_completes_and_lists(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, ANSWER))
    async with http_stage(fake) as (_, port), openai_client(port) as client:
        whole = await client.completions.create(model=MODEL, prompt="Once", max_tokens=100)
        stream = await client.completions.create(
            model=MODEL, prompt="Once", stream=True, max_tokens=100
        )
        texts = [chunk.choices[0].text async for chunk in stream]
        models = [model.id async for model in client.models.list()]
        model = await client.models.retrieve(MODEL)
    assert whole.choices[0].text == "".join(texts) == ANSWER
    assert models == [model.id] == [MODEL]


@on_uvloop
async def test_the_openai_client_parses_into_a_model(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    class City(pydantic.BaseModel):
        name: str
        people: int

    fake = FakeWorker(record(checkpoint), says(tokenizer, '{"name": "Jena", "people": 110000}'))
    async with http_stage(fake) as (_, port), openai_client(port) as client:
        parsed = await client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=City
        )
        async with client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, response_format=City
        ) as stream:
            streamed = await stream.get_final_completion()
    jena = City(name="Jena", people=110000)
    assert parsed.choices[0].message.parsed == streamed.choices[0].message.parsed == jena
    for submit in fake.submits:
        guided = submit.request.sampling.guided
        assert guided is not None
        assert guided.kind is GuidedKind.JSON_SCHEMA
        assert json.loads(guided.value)["properties"].keys() == {"name", "people"}


@on_uvloop
async def test_the_openai_client_knows_our_errors(checkpoint: Path, tokenizer: Tokenizer) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, ANSWER))
    async with http_stage(fake) as (_, port), openai_client(port) as client:
        with pytest.raises(openai.NotFoundError, match="no model 'x' is served"):
            await client.chat.completions.create(model="x", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, extra_body={"guided_jsn": {}}
            )
        assert error.value.param == "guided_jsn"

        def breaks(worker: FakeWorker, submit: Submit) -> None:
            worker.chunk(submit.stream, tokenizer.encode(ANSWER).ids[:1])

        fake.script = breaks
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        assert (await anext(stream)).choices[0].delta.role == "assistant"
        fake.end(
            fake.submits[-1].stream,
            FinishReason.ERROR,
            error_code="engine_error",
            error_message="no blocks",
        )
        with pytest.raises(openai.APIError, match="no blocks"):
            async for _chunk in stream:
                pass


@on_uvloop
async def test_tokens_go_past_asgi_one_chunk_each(
    checkpoint: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    write = Exchange.write

    async def watched(self: Exchange, body: bytes, *, more: bool = True) -> None:
        writes.append(body)
        await write(self, body, more=more)

    monkeypatch.setattr(Exchange, "write", watched)
    token_ids = tokenizer.encode(ANSWER).ids
    fake = FakeWorker(record(checkpoint))
    async with http_stage(fake) as (_, port), connection(port) as (reader, writer):
        writer.write(request(chat_body(stream=True, stop="nothing of it")))
        await fake.until_submits(1)
        stream = fake.submits[0].stream
        fake.chunk(stream, token_ids[:1])
        assert (await read_head(reader))[0] == 200
        assert b"Hell" in await reader.readuntil(b"Hell")
        for token_id in token_ids[1:]:
            fake.token(stream, token_id)
        fake.end(stream)
        rest = await reader.readuntil(b"0\r\n\r\n")
    assert len(writes) == 2, "the beginning and the end"
    assert rest.count(b"data: ") > 8
    text = b"".join(
        json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"].get("content", "").encode()
        for line in rest.splitlines()
        if line.startswith(b"data: {")
    ).decode()
    assert ANSWER.endswith(text)
    assert len(text) > len(ANSWER) - 6


@on_uvloop
async def test_a_client_that_closes_its_connection_aborts_its_request(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint))
    async with http_stage(fake) as (playing, port):
        for streamed in (True, False):
            fake.submits.clear()
            fake.aborted.clear()
            async with connection(port) as (reader, writer):
                writer.write(request(chat_body(stream=streamed, n=2)))
                await fake.until_submits(2)
                if streamed:
                    fake.chunk(fake.submits[0].stream, tokenizer.encode(ANSWER).ids[:1])
                    await read_head(reader)
            await fake.until(lambda: fake.aborted)
            assert fake.aborted == [submit.stream for submit in fake.submits]
        dispatcher = playing.ingress.dispatcher
        assert dispatcher is not None
        await asyncio.wait_for(dispatcher.idle.wait(), 5)


@on_uvloop
async def test_tokens_for_a_connection_that_was_reset_hurt_nobody_else(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    fake = FakeWorker(record(checkpoint))
    async with http_stage(fake) as (_, port), connection(port) as (reader, writer):
        leaving, staying = (request(chat_body(stream=True)) for _ in range(2))
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(leaving)
            await fake.until_submits(1)
            writer.write(staying)
            await fake.until_submits(2)
            first, second = (submit.stream for submit in fake.submits)
            for stream in (first, second):
                fake.chunk(stream, token_ids[:1])
            await read_head(reader)
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        # The reset is not noticed before the loop looks; until then tokens still come.
        for token_id in token_ids[1:]:
            fake.token(first, token_id)
            fake.token(second, token_id)
        fake.end(second)
        chunks = await read_chunks(reader)
        await fake.until(lambda: fake.aborted == [first])
    assert chunks[-1].endswith(b"data: [DONE]\n\n")


@on_uvloop
async def test_a_connection_serves_one_request_after_the_other_and_pipelined_ones(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, ANSWER))
    async with http_stage(fake) as (_, port), connection(port) as (reader, writer):
        for _ in range(2):
            writer.write(request(chat_body()))
            assert (await read_response(reader))[0] == 200
            writer.write(request(chat_body(stream=True)))
            assert (await read_head(reader))[0] == 200
            assert (await read_chunks(reader))[-1].endswith(b"[DONE]\n\n")
        writer.write(request(chat_body(stream=True)) + request(chat_body(temperature=5)))
        assert (await read_head(reader))[0] == 200
        assert (await read_chunks(reader))[-1].endswith(b"[DONE]\n\n")
        assert (await read_response(reader))[0] == 400


@on_uvloop
async def test_a_client_that_leaves_after_pipelining_aborts_the_request_in_work(
    checkpoint: Path,
) -> None:
    fake = FakeWorker(record(checkpoint))
    async with http_stage(fake) as (_, port):
        async with connection(port) as (_reader, writer):
            writer.write(request(chat_body()) + request(chat_body()))
            await fake.until_submits(1)
        await fake.until(lambda: fake.aborted)
    assert len(fake.submits) == 1


@pytest.mark.parametrize(
    "garbage", [b"NONSENSE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00"]
)
@on_uvloop
async def test_bytes_that_are_no_http_get_openais_error_shape(
    checkpoint: Path, garbage: bytes
) -> None:
    async with (
        http_stage(FakeWorker(record(checkpoint))) as (_, port),
        connection(port) as (reader, writer),
    ):
        writer.write(garbage)
        status, said = await read_response(reader)
    assert status == 400
    assert said["error"]["message"] == "Invalid HTTP request received."


@on_uvloop
async def test_an_unwanted_upgrade_is_an_ordinary_request(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, ANSWER))
    async with http_stage(fake) as (_, port), connection(port) as (reader, writer):
        writer.write(b"GET /live HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
        assert (await read_response(reader))[0] == 200


@on_uvloop
async def test_one_connection_too_many_is_told_so(checkpoint: Path) -> None:
    async with (
        http_stage(FakeWorker(record(checkpoint)), max_connections=1) as (_, port),
        connection(port) as (first, writer),
    ):
        writer.write(b"GET /live HTTP/1.1\r\nHost: t\r\n\r\n")
        assert (await read_response(first))[0] == 200
        async with connection(port) as (second, _writer):
            status, said = await read_response(second)
            assert status == 503
            assert said["error"]["message"] == "1 connections are open already"
            assert await second.read() == b""
        writer.write(b"GET /live HTTP/1.1\r\nHost: t\r\n\r\n")
        assert (await read_response(first))[0] == 200


@on_uvloop
async def test_http_sockets_send_at_once(checkpoint: Path) -> None:
    async with (
        http_stage(FakeWorker(record(checkpoint))) as (playing, port),
        connection(port) as (reader, writer),
    ):
        writer.write(b"GET /live HTTP/1.1\r\nHost: t\r\n\r\n")
        assert (await read_response(reader))[0] == 200
        assert playing.server is not None
        [protocol] = playing.server.server_state.connections
        sock = protocol.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

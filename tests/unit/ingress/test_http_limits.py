"""The ingress behind its real HTTP server."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import record
from tests.unit.ingress.fakes import FakeWorker, says
from tests.unit.ingress.raw_http import (
    chat_body,
    connection,
    on_uvloop,
    read_head,
    read_response,
    request,
)
from tests.unit.ingress.stage import http_stage
from trtllm_workers.ingress.http import IngressProtocol
from trtllm_workers.types import FinishReason

ANSWER = "Hello 日本 🎉 world. STOP here and there."


@pytest.mark.parametrize("chunked", [False, True])
@on_uvloop
async def test_a_body_of_100_mb_is_refused_without_being_held(
    checkpoint: Path, tokenizer: Tokenizer, chunked: bool
) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, ANSWER))
    size = 100_000_000
    async with http_stage(fake) as (_, port), connection(port) as (reader, writer):
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\n{framing}\r\n\r\n".encode()
        )
        piece = b"x" * 1_000_000
        for _ in range(size // len(piece)):
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")
        status, said = await read_response(reader)
        assert status == 413
        assert said["error"]["code"] == "request_too_large"
        assert "at most 16777216 are accepted" in said["error"]["message"]
        assert await reader.read() == b"", "the connection is closed"
    assert fake.submits == []


@on_uvloop
async def test_a_body_that_is_announced_too_large_is_refused_before_it_comes(
    checkpoint: Path,
) -> None:
    async with (
        http_stage(FakeWorker(record(checkpoint)), max_body_bytes=100) as (_, port),
        connection(port) as (reader, writer),
    ):
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: 101\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        status, said = await read_response(reader)
        assert status == 413
        assert "has 101 bytes or more; at most 100" in said["error"]["message"]


@on_uvloop
async def test_a_client_that_does_not_read_is_dropped(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    word = tokenizer.encode(" world").ids[0]
    fake = FakeWorker(record(checkpoint, max_seq_len=10_000_000))
    async with http_stage(fake, max_unread_bytes=200_000) as (playing, port):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", port))
            sock.sendall(request(chat_body(stream=True)))
            await fake.until_submits(1)
            stream = fake.submits[0].stream
            fake.chunk(stream, [word])
            async with asyncio.timeout(20):
                while not fake.aborted:
                    for _ in range(200):
                        fake.token(stream, word)
                    await asyncio.sleep(0)
        assert fake.aborted == [stream]
        dispatcher = playing.ingress.dispatcher
        assert dispatcher is not None
        await asyncio.wait_for(dispatcher.idle.wait(), 5)
        metrics = (await playing.client.get("/metrics")).text
    assert 'aborted_requests_total{cause="slow_client"} 1.0' in metrics


@on_uvloop
async def test_a_client_that_pauses_and_reads_on_loses_nothing(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    word = tokenizer.encode("Hello").ids[0]
    fake = FakeWorker(record(checkpoint, max_seq_len=10_000_000))
    async with http_stage(fake, max_unread_bytes=50_000_000) as (playing, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2048)
        try:
            writer.write(request(chat_body(stream=True, max_tokens=30_000)))
            await fake.until_submits(1)
            stream = fake.submits[0].stream
            fake.chunk(stream, [word])
            await asyncio.wait_for(read_head(reader), 10)
            for _ in range(29_999):
                fake.token(stream, word)
            assert playing.server is not None
            [protocol] = playing.server.server_state.connections
            assert isinstance(protocol, IngressProtocol)
            assert protocol.flow.write_paused, "nobody reads"
            fake.end(stream, FinishReason.LENGTH)
            body = b""
            while not body.endswith(b"0\r\n\r\n"):
                body += await asyncio.wait_for(reader.read(1 << 20), 10)
        finally:
            writer.close()
    assert body.count(b'"content":"Hell"') == 30_000
    assert fake.aborted == []

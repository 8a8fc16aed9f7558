from __future__ import annotations

import asyncio
import gzip
import ssl
from pathlib import Path

import pytest

from tests.contract.certificates import authority
from tests.unit.media.fetching import fetched, names, refused
from tests.unit.media.support import answering, response, serving
from trtllm_workers.config.media import MediaSettings

# --- limits --------------------------------------------------------------------------------------


async def test_too_large_by_its_own_word_is_refused_unread() -> None:
    async def answer(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(response(b"", length=10_001))
        await writer.drain()
        await asyncio.Event().wait()  # no body ever comes, and none is waited for

    async with serving(answer) as server:
        assert "10000 bytes" in await refused(server.url())


@pytest.mark.parametrize("head", [b"", b"Transfer-Encoding: chunked\r\n"])
async def test_an_endless_body_is_cut_off(head: bytes) -> None:
    async def answer(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        while True:
            writer.write(b"64\r\n" + bytes(100) + b"\r\n" if head else bytes(100))
            await writer.drain()

    async with serving(answer) as server:
        assert "10000 bytes" in await refused(server.url())


async def test_a_body_at_the_limit_is_taken() -> None:
    async with serving(answering(response(bytes(10_000)))) as server:
        assert len(await fetched(server.url())) == 10_000


async def test_a_compressed_body_is_refused() -> None:
    bomb = gzip.compress(bytes(1_000_000))
    for coding in ("gzip", "GZIP", "br", "deflate", "gzip, gzip"):
        async with serving(answering(response(bomb, f"Content-Encoding: {coding}"))) as server:
            assert "compressed" in await refused(server.url())


@pytest.mark.parametrize(
    "answer",
    [
        response(b"abc", length=5),
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
    ],
)
async def test_broken_answers_are_refused(answer: bytes) -> None:
    async with serving(answering(answer)) as server:
        assert "could not be fetched" in await refused(server.url())


async def test_other_statuses_are_told() -> None:
    for status in (
        "404 Not Found",
        "206 Partial Content",
        "304 Not Modified",
        "500 Oh",
        "302 Found",
    ):
        async with serving(answering(response(b"", status=status))) as server:
            assert f"status {status[:3]}" in await refused(server.url())


async def test_nobody_listens() -> None:
    async with serving(answering(b"")) as server:
        pass
    assert "could not be fetched" in await refused(server.url())


async def test_a_server_that_drips_has_one_deadline_for_all() -> None:
    settings = MediaSettings(url_hosts=("127.0.0.1",), timeout_s=0.3)

    async def answer(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)  # what the server does, not what the test waits for

    async with serving(answer) as server:
        assert "0.3 s" in await refused(server.url(), settings)


async def test_a_server_that_never_answers_and_a_name_that_never_resolves() -> None:
    settings = MediaSettings(url_hosts=("127.0.0.1", "slow.example"), timeout_s=0.2)

    async def silent(_head: bytes, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def never(_host: str, _port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    async with serving(silent) as server:
        assert "0.2 s" in await refused(server.url(), settings)
    assert "0.2 s" in await refused("http://slow.example/", settings, resolver=never)


# --- TLS -----------------------------------------------------------------------------------------


async def test_certificates_are_checked_against_the_name(tmp_path: Path) -> None:
    signer = authority(tmp_path / "authority")
    files = signer.signs("server", "DNS:images.example")
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    assert files.cert is not None
    theirs.load_cert_chain(files.cert, files.key)
    asked: list[str | None] = []
    theirs.sni_callback = lambda _socket, name, _context: asked.append(name)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response(b"over tls"))
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=theirs)
    port = listening.sockets[0].getsockname()[1]
    settings = MediaSettings(url_hosts=("images.example", "other.example"), timeout_s=5.0)
    resolver = names(**{"images.example": "127.0.0.1", "other.example": "127.0.0.1"})
    ours = ssl.create_default_context(cafile=str(signer.ca))
    async with listening:
        options: dict[str, object] = {"resolver": resolver, "ssl_context": ours}
        assert await fetched(f"https://images.example:{port}/", settings, **options) == b"over tls"
        assert asked == ["images.example"]
        await refused(f"https://other.example:{port}/", settings, **options)
        # Without the authority that signed it.
        await refused(f"https://images.example:{port}/", settings, resolver=resolver)

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.media.fetching import fetched, names, refused
from tests.unit.media.support import (
    Answer,
    answering,
    redirecting,
    response,
    serving,
)
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.media import urls
from trtllm_workers.media.addresses import may_connect


async def test_a_body_is_fetched_and_nothing_of_us_is_told() -> None:
    async with serving(answering(response(b"body"))) as server:
        assert await fetched(server.url("/a b.png?x=1&y=%20é#part".replace(" ", "%20"))) == b"body"
    [head] = server.requests
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "get /a%20b.png?x=1&y=%20%c3%a9 http/1.1"
    assert f"host: 127.0.0.1:{server.port}" in lines
    assert "accept-encoding: identity" in lines
    assert not any(line.startswith(("cookie", "authorization", "referer")) for line in lines)


async def test_a_chunked_body_without_length_is_fetched() -> None:
    body = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with serving(answering(body)) as server:
        assert await fetched(server.url()) == b"abcde"


async def test_redirects_are_followed_relative_ones_too() -> None:
    async def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
        if b"/first" in head:
            writer.write(response(b"", "Location: ../second", status="301 Moved"))
        elif b"/second" in head:
            writer.write(
                response(b"", f"Location: http://localhost:{server.port}/x", status="307 T")
            )
        else:
            writer.write(response(b"there"))

    async with serving(answer) as server:
        assert await fetched(server.url("/a/first")) == b"there"
    assert server.connections == 3


async def test_endless_redirects_end() -> None:
    async with serving(redirecting("/again")) as server:
        assert "5 times" in await refused(server.url())
    assert server.connections == 6


# --- addresses -----------------------------------------------------------------------------------

HIDDEN = [
    *("http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://localhost.:{port}/"),
    *(
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://[::ffff:7f00:1]:{port}/",
    ),
    *("http://2130706433:{port}/", "http://0x7f.1:{port}/", "http://0177.0.0.1:{port}/"),
    *(
        "http://127.1:{port}/",
        "http://0:{port}/",
        "http://0.0.0.0:{port}/",
        "http://①②⑦.0.0.1:{port}/",
    ),
    *("http://user@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@public.example/"),
    *("http://public.example@127.0.0.1:{port}/", "http://[fe80::1%25lo]:{port}/"),
    *(
        "http://:{port}/",
        "http:///{port}",
        "http://public.example:0/",
        "http://public.example:99999/",
    ),
    *(
        "http://pub lic.example:{port}/",
        "http://public.example:{port}/\r\nX: y",
        "http://\t127.0.0.1:{port}",
    ),
]


@pytest.mark.parametrize("url", HIDDEN)
async def test_this_machine_is_not_fetched_from_however_it_is_written(url: str) -> None:
    settings = MediaSettings(timeout_s=5.0)
    async with serving(answering(response(b"secret"))) as server:
        await refused(url.format(port=server.port), settings)
    assert server.connections == 0


@pytest.mark.parametrize(
    "addresses",
    [
        *("127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fd00:ec2::254"),
        *("8.8.8.8 127.0.0.1", "127.0.0.1 8.8.8.8", "2606:4700::1111 10.0.0.7", "fe80::1%lo", ""),
    ],
)
async def test_a_name_with_any_address_that_is_not_public_is_refused(addresses: str) -> None:
    text = await refused(
        "http://images.example/", MediaSettings(), resolver=names(**{"images.example": addresses})
    )
    # The same words as for a name that is not there.
    assert text == await refused("http://other.example/", MediaSettings(), resolver=names())


@pytest.mark.parametrize("address", ["169.254.169.254", "fd00:ec2::254", "fe80::1", "0.0.0.0"])
async def test_a_listed_host_may_be_private_but_not_where_credentials_are(address: str) -> None:
    settings = MediaSettings(url_hosts=("images.internal",))
    resolver = names(**{"images.internal": address})
    await refused("http://images.internal/", settings, resolver=resolver)


async def test_with_a_list_other_hosts_are_refused_before_they_are_resolved() -> None:
    async def resolve(_host: str, _port: int) -> list[str]:
        raise AssertionError("resolved")

    settings = MediaSettings(url_hosts=("images.internal:8080",))
    for url in (
        "http://images.internal/",
        "http://8.8.8.8/",
        "http://images.internal.evil.example:8080/",
    ):
        await refused(url, settings, resolver=resolve)


async def test_the_address_that_was_checked_is_the_one_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = [["127.0.0.1"], ["10.0.0.7"]]

    async def resolve(host: str, _port: int) -> list[str]:
        assert host == "images.example"
        return answers.pop(0)

    checked: list[str] = []

    def allowed(address: str, *, listed: bool) -> bool:
        assert not listed
        checked.append(address)
        return address == "127.0.0.1"  # stands for a public one

    monkeypatch.setattr(urls, "may_connect", allowed)

    async def answer(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(
            response(b"", f"Location: http://images.example:{server.port}/b", status="302 F")
        )

    async with serving(answer) as server:
        # The second time the name leads elsewhere: it is checked again, and refused.
        await refused(f"http://images.example:{server.port}/a", MediaSettings(), resolver=resolve)
    assert checked == ["127.0.0.1", "10.0.0.7"]
    assert answers == []
    assert server.connections == 1
    assert b"Host: images.example:" in server.requests[0]


@pytest.mark.parametrize(
    "to",
    [
        *(
            "http://169.254.169.254/latest/meta-data/",
            "http://[::ffff:169.254.169.254]/",
            "http://10.0.0.1/",
        ),
        *(
            "file:///etc/passwd",
            "ftp://localhost/x",
            "data:image/png;base64,AAAA",
            "http://user:x@localhost/",
        ),
        *("//other.example/", "http://localhost:0/", "gopher://localhost/"),
    ],
)
async def test_every_redirect_is_checked(to: str) -> None:
    async with serving(redirecting(to)) as server:
        await refused(server.url())
    assert server.connections == 1


async def test_a_public_host_cannot_redirect_to_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = may_connect
    resolver = names(**{"public.example": "127.0.0.2", "localhost": "127.0.0.1"})
    monkeypatch.setattr(
        urls, "may_connect", lambda ip, listed: ip == "127.0.0.2" or real(ip, listed=listed)
    )
    async with serving(answering(response(b"secret"))) as inside:

        async def answer(_head: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(response(b"", f"Location: {inside.url()}", status="302 Found"))

        listening = await asyncio.start_server(_one(answer), "127.0.0.2", 0)
        port = listening.sockets[0].getsockname()[1]
        async with listening:
            await refused(f"http://public.example:{port}/", MediaSettings(), resolver=resolver)
    assert inside.connections == 0


def _one(
    answer: Answer,
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(await reader.readuntil(b"\r\n\r\n"), writer)
        writer.close()

    return handle


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    async with serving(answering(response(b"body"))) as server:
        assert await fetched(server.url()) == b"body"

"""How a process gets to NATS: several servers, users, tokens, TLS; and what it says when it does not."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.nats_server import nats_server
from trtllm_workers.config.outside import NatsLogin, TlsFiles
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.queue_nats import NatsQueue, QueueSpec, open_nats_queue, queue_name


async def opened(*servers: str, login: NatsLogin = NatsLogin(), timeout_s: float = 5) -> NatsQueue:  # noqa: B008
    return await open_nats_queue(
        servers, login, QueueSpec("work"), name="test", decides=True, timeout_s=timeout_s
    )


async def works(*servers: str, login: NatsLogin) -> None:
    queue = await opened(*servers, login=login)
    assert await queue.put(b"x") > 0
    await queue.close()


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def test_nobody_there_is_told_with_address_time_and_remedy() -> None:
    port = closed_port()
    with pytest.raises(ConfigError) as told:
        await opened(f"nats://me:secret@127.0.0.1:{port}", timeout_s=0.3)
    text = str(told.value)
    assert f"no NATS server at nats://127.0.0.1:{port} after 0.3 s" in text
    assert "--nats-server" in text
    assert "secret" not in text


async def test_one_server_of_several_is_enough(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        await works(f"nats://127.0.0.1:{closed_port()}", server.url, login=NatsLogin())


async def test_user_and_token_are_used(tmp_path: Path) -> None:
    with nats_server(tmp_path / "a", "--user", "u", "--pass", "p") as server:
        await works(server.url, login=NatsLogin(user="u", password="p"))
        await works(server.url.replace("//", "//u:p@"), login=NatsLogin())
    with nats_server(tmp_path / "b", "--auth", "t") as server:
        await works(server.url, login=NatsLogin(token="t"))


@pytest.mark.parametrize(
    "login", [NatsLogin(), NatsLogin(user="u", password="wrong"), NatsLogin(token="wrong")]
)
async def test_who_is_not_let_in_is_told_at_once(tmp_path: Path, login: NatsLogin) -> None:
    with nats_server(tmp_path, "--user", "u", "--pass", "p") as server:
        began_s = time.monotonic()
        with pytest.raises(ConfigError, match=r"does not let us in: .*NATS_PASSWORD") as told:
            await opened(server.url, login=login, timeout_s=30)
        assert time.monotonic() - began_s < 5
        assert "wrong" not in str(told.value)


async def test_a_server_without_jetstream_is_told(tmp_path: Path) -> None:
    config = (
        "jetstream: disabled\nno_auth_user: u\naccounts: {A: {users: [{user: u, password: p}]}}"
    )
    with (
        nats_server(tmp_path, config=config) as server,
        pytest.raises(ConfigError, match=r"no JetStream.*-js"),
    ):
        await opened(server.url)


async def test_a_queue_that_its_server_lost_is_made_again(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        queue = await opened(server.url)
        assert await queue.take(0.1) is None
        await queue._js.delete_stream("work")
        assert await queue.put(b"x") > 0
        item = None
        while item is None:
            item = await queue.take(1.0)
        await item.ack()
        await queue.close()


def certificates(folder: Path) -> TlsFiles:
    folder.mkdir()
    ca, key, cert = folder / "ca.pem", folder / "key.pem", folder / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run(
        [
            *(*make, "-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    ca.write_bytes(cert.read_bytes())
    return TlsFiles(ca, cert, key)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
async def test_tls_is_used_and_checked(tmp_path: Path) -> None:
    files, others = certificates(tmp_path / "tls"), certificates(tmp_path / "others")
    options = ("--tlsverify", f"--tlscacert={files.ca}", f"--tlscert={files.cert}")
    with nats_server(tmp_path / "nats", *options, f"--tlskey={files.key}") as server:
        url = server.url.replace("nats://", "tls://")
        await works(url, login=NatsLogin(tls=files))
        with pytest.raises(ConfigError, match=r"(?i)certificate"):
            await opened(url, login=NatsLogin(tls=others), timeout_s=1)


async def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nats.aio.client", None)
    with pytest.raises(ConfigError, match=r"pip install 'trtllm-launch\[nats\]'"):
        await opened("nats://127.0.0.1:4222")


def test_names_of_queues_differ_where_their_words_do() -> None:
    words = [
        ("a-b", "c"),
        ("a", "b-c"),
        ("a.b", "c"),
        ("a_b", "c"),
        ("ab", "c"),
        ("a", "é"),
        ("a", ""),
    ]
    names = {queue_name(*one) for one in words}
    assert len(names) == len(words)
    for name in names | {queue_name("x" * 300, "é" * 90)}:
        assert len(name) < 250
        assert not set(name) & set(" .*>/\\")
    assert queue_name("x" * 300) != queue_name("x" * 301)

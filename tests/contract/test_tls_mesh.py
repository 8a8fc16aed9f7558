"""The encrypted request plane: who gets in, what a process that does not fit is told, on which loop."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest
import uvloop
from structlog.testing import capture_logs

from tests.contract import test_request_plane
from tests.contract.certificates import Authority, authority
from tests.contract.planes import Endpoint, Net, TcpNet, soon
from trtllm_workers.config.outside import TlsFiles
from trtllm_workers.errors import AuthenticationFailed, ConfigError, PeerLost
from trtllm_workers.planes import connection
from trtllm_workers.planes.messages import Drain
from trtllm_workers.planes.tls import PlaneTls, looks_like_tls
from trtllm_workers.types import Address

SECRET_WORDS = "the prompt of a patient " * 40


@pytest.fixture
async def net(plane_files: TlsFiles) -> AsyncIterator[TcpNet]:
    made = TcpNet(plane_files, max_buffered_bytes=4_000_000)
    yield made
    await made.close()


class Relay:
    """Sits between two processes and notes what passes."""

    def __init__(self, target: Address) -> None:
        self._target = target
        self.passed = b""
        self._server: asyncio.Server | None = None

    async def start(self) -> Address:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return Address("127.0.0.1", port, self._target.peer_id, self._target.incarnation)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._target.host, self._target.port)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pass_on(reader, back))
            group.create_task(self._pass_on(there, writer))

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while piece := await source.read(65536):
            self.passed += piece
            sink.write(piece)
        sink.close()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()


@pytest.mark.parametrize("encrypted", [True, False])
async def test_who_sits_on_the_path_reads_nothing(plane_files: TlsFiles, encrypted: bool) -> None:
    net = TcpNet(plane_files if encrypted else None)
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    relay = Relay(worker.address)
    peer = await soon(ingress.plane.connect(await relay.start()))
    peer.send(Drain(SECRET_WORDS))
    await worker.until(lambda: worker.words() == [SECRET_WORDS])
    assert (
        SECRET_WORDS.encode() in relay.passed
    ) is not encrypted  # the plain one shows the relay works
    await net.close()
    await soon(relay.close())


async def test_messages_of_one_iteration_leave_in_one_write_without_delay(net: TcpNet) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    peer = cast("connection.Connection", await soon(ingress.plane.connect(worker.address)))
    transport = cast("asyncio.Transport", peer._transport)
    sock = transport.get_extra_info("socket")
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    writes: list[bytes] = []
    write = transport.write

    def note(data: bytes | bytearray | memoryview) -> None:
        writes.append(bytes(data))
        write(data)

    transport.write = note  # type: ignore[method-assign]  # a test stands in for the kernel here
    for number in range(100):
        peer.send(Drain(str(number)))
    await worker.until(lambda: len(worker.received) == 100)
    assert len(writes) == 1


async def refused(net: TcpNet, ingress: Endpoint, worker: Endpoint) -> tuple[str, str]:
    """Return what the dialing side is told and what the other side logs."""
    with capture_logs() as logs:
        with pytest.raises((AuthenticationFailed, PeerLost)) as caught:
            await soon(ingress.plane.connect(worker.address))
        await net.close()
    (line,) = [log for log in logs if log["event"] == "connection refused"]
    assert line["log_level"] == "warning"
    assert ingress.received == worker.received == []
    return str(caught.value), line["reason"]


@pytest.mark.parametrize("encrypted", ["ingress", "worker"])
async def test_plain_process_and_encrypted_one_are_both_told_the_remedy(
    plane_files: TlsFiles, encrypted: str
) -> None:
    net = TcpNet()
    ends = []
    for name in ("ingress", "worker"):
        net.tls = plane_files if encrypted == name else None
        ends.append(await net.endpoint(name))
    for words in await refused(net, *ends):
        assert "--plane-cacert, --plane-cert and --plane-key" in words
        assert "encrypt" in words


async def test_peer_that_another_authority_signed_for_is_refused(
    plane_files: TlsFiles, cluster_authority: Authority, tmp_path: Path
) -> None:
    stranger = authority(tmp_path / "other").signs("stranger")
    net = TcpNet(plane_files)
    worker = await net.endpoint("worker-0")
    # It trusts our authority, so only the worker has a reason to refuse.
    net.tls = dataclasses.replace(stranger, ca=cluster_authority.ca)
    told, logged = await refused(net, await net.endpoint("ingress-0"), worker)
    assert "unknown ca" in told
    assert "unable to get local issuer certificate" in logged
    assert "--plane-cacert" in logged


async def test_peer_that_does_not_trust_our_authority_refuses_us(
    plane_files: TlsFiles, tmp_path: Path
) -> None:
    net = TcpNet(plane_files)
    worker = await net.endpoint("worker-0")
    net.tls = authority(tmp_path / "other").signs("stranger")
    told, logged = await refused(net, await net.endpoint("ingress-0"), worker)
    assert "certificate" in told
    assert "--plane-cacert" in told
    assert "unknown ca" in logged


async def test_certificate_alone_does_not_let_in_without_the_secret(plane_files: TlsFiles) -> None:
    net = TcpNet(plane_files)
    worker = await net.endpoint("worker-0")
    told, logged = await refused(net, await net.endpoint("ingress-0", secret=b"other"), worker)
    assert "do not hold the same cluster secret" in told
    assert "do not hold the same cluster secret" in logged


async def test_peer_that_stays_silent_in_the_tls_handshake_is_let_go(
    net: TcpNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT_S", 0.05)
    worker = await net.endpoint("worker-0")
    reader, writer = await asyncio.open_connection("127.0.0.1", worker.address.port)
    writer.write(b"\x16\x03\x01")  # the beginning of a greeting
    await soon(reader.read())
    writer.close()


@pytest.mark.parametrize(
    ("begin", "is_tls"),
    {
        b"\x16\x03\x01": True,
        b"\x15\x03\x03\x00": True,
        b"\x16\x03": False,  # too little to tell
        b"\x16\x03\x00\x00\x02": False,  # a frame of 790 bytes
        b"GET": False,
    }.items(),
)
def test_tls_and_frames_are_told_apart_by_three_bytes(begin: bytes, is_tls: bool) -> None:
    assert looks_like_tls(begin) is is_tls


def test_files_that_cannot_be_used_are_named(plane_files: TlsFiles, tmp_path: Path) -> None:
    noise = tmp_path / "noise.pem"
    noise.write_text("no certificate")
    with pytest.raises(ConfigError, match=r"--plane-cacert .*noise\.pem"):
        PlaneTls(dataclasses.replace(plane_files, ca=noise))
    with pytest.raises(ConfigError, match=r"--plane-cert .*--plane-key .*noise\.pem"):
        PlaneTls(dataclasses.replace(plane_files, key=noise))
    with pytest.raises(ConfigError, match="three files"):
        PlaneTls(TlsFiles(ca=plane_files.ca))


CONTRACT = [
    cast("Callable[[Net], Awaitable[None]]", test)
    for name, test in inspect.getmembers(test_request_plane, inspect.iscoroutinefunction)
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["net"]
]


@pytest.mark.parametrize(
    "test", CONTRACT, ids=lambda test: str(test.__name__).removeprefix("test_")
)
def test_contract_holds_encrypted_on_uvloop(
    test: Callable[[Net], Awaitable[None]], plane_files: TlsFiles
) -> None:
    async def run() -> None:
        made = TcpNet(plane_files)
        try:
            await test(made)
        finally:
            await made.close()

    uvloop.run(run())

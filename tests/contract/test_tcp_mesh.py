"""What the TCP mesh does with peers that misbehave on the wire, and the contract on uvloop."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import cast

import pytest
import uvloop

from tests.contract import test_request_plane
from tests.contract.planes import SECRET, Net, TcpNet, soon
from tests.contract.wire import STRANGER, Wire, dialed, listening, stay_silent
from trtllm_workers.errors import ConfigError, PeerLost, StaleIncarnation, StartError
from trtllm_workers.planes import connection, mesh
from trtllm_workers.planes.frames import PROTOCOL_VERSION, encode
from trtllm_workers.planes.handshake import Handshake
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import Drain, Ping, Pong
from trtllm_workers.types import Address

NEWER = f"protocol version {PROTOCOL_VERSION + 1}, this process version {PROTOCOL_VERSION}"


@pytest.fixture
async def net() -> AsyncIterator[TcpNet]:
    made = TcpNet(ping_interval_s=0.05, ping_deadline_s=0.3, max_buffered_bytes=4_000_000)
    yield made
    await made.close()


# Before the secret is proven


async def test_message_of_a_stranger_is_not_delivered(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    async with dialed(worker, me=None) as wire:
        wire.send(encode(Drain("let me in")))
        assert b"no handshake" in await wire.ended()
    assert worker.received == []
    assert worker.lost == []


async def test_message_before_the_proof_is_not_delivered(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    async with dialed(worker, me=None) as wire:
        handshake = Handshake(STRANGER, b"guess", worker.address, {})
        wire.send(handshake.opening() + encode(Drain("let me in")))
        await wire.ended()
    assert worker.received == []


GARBAGE = {
    "a web browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a length of 100 MB": struct.pack("<IB", 100_000_000, PROTOCOL_VERSION) + b"x" * 100,
    "noise": bytes(range(256)) * 64,
    "a newer release": struct.pack("<IB", 3, PROTOCOL_VERSION + 1) + b"xx",
    "nothing at all": b"",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_instead_of_a_handshake_disturbs_nobody(net: TcpNet, garbage: bytes) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    peer = await soon(ingress.plane.connect(worker.address))
    async with dialed(worker, me=None) as wire:
        wire.send(garbage)
        if garbage:
            await wire.ended()
    peer.send(Drain("undisturbed"))
    await worker.until(lambda: worker.received)
    assert worker.lost == []


async def test_newer_release_is_told_both_versions(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    async with dialed(worker, me=None) as wire:
        wire.send(GARBAGE["a newer release"])
        assert NEWER.encode() in await wire.ended()


async def test_connecting_to_a_newer_release_names_both_versions(net: TcpNet) -> None:
    ingress = await net.endpoint("ingress-0")

    async def newer(wire: Wire) -> None:
        wire.send(GARBAGE["a newer release"])
        await wire.ended()

    async with listening(newer) as address:
        with pytest.raises(PeerLost, match=NEWER):
            await soon(ingress.plane.connect(address))


async def test_connector_that_stays_silent_is_hung_up_on(
    net: TcpNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT_S", 0.05)
    worker = await net.endpoint("worker-0")
    async with dialed(worker, me=None) as wire:
        assert b"no handshake" in await wire.ended()


async def test_connector_that_sends_a_byte_now_and_then_is_hung_up_on(
    net: TcpNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_TIMEOUT_S", 0.1)
    worker = await net.endpoint("worker-0")
    async with dialed(worker, me=None) as wire:
        opening = Handshake(STRANGER, SECRET, worker.address, {}).opening()
        hung_up = asyncio.create_task(wire.ended())
        for byte in opening:
            wire.send(bytes([byte]))
            done, _ = await asyncio.wait({hung_up}, timeout=0.02)
            if done:
                break
        assert b"no handshake" in await hung_up


async def test_silent_connectors_do_not_keep_others_out(
    net: TcpNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "MAX_HALF_OPEN", 3)
    monkeypatch.setattr(mesh, "HALF_OPEN_GRACE_S", 0.0)
    worker, ingress = await net.endpoint("worker-0"), await net.endpoint("ingress-0")
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(dialed(worker, me=None))
        for _ in range(3):
            await stack.enter_async_context(dialed(worker, me=None))
        assert b"more than 3 handshakes" in await first.ended()
        await soon(ingress.plane.connect(worker.address))


async def test_many_that_connect_at_once_all_get_in(
    net: TcpNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh, "MAX_HALF_OPEN", 3)
    worker = await net.endpoint("worker-0")
    many = [await net.endpoint(f"ingress-{index}") for index in range(30)]
    await soon(asyncio.gather(*(each.plane.connect(worker.address) for each in many)))
    assert len(worker.plane.peers()) == 30


async def test_listener_that_never_answers_is_given_up(net: TcpNet) -> None:
    ingress = await net.endpoint("ingress-0")
    async with listening(stay_silent) as address:
        with pytest.raises(PeerLost, match=r"silent@127.0.0.1:\d+ did not answer within 0.05 s"):
            await soon(ingress.plane.connect(address, timeout_s=0.05))


async def test_each_waiting_connect_has_its_own_deadline(net: TcpNet) -> None:
    ingress = await net.endpoint("ingress-0")
    async with listening(stay_silent) as address:
        patient = asyncio.create_task(ingress.plane.connect(address, timeout_s=60.0))
        with pytest.raises(PeerLost, match=r"within 0\.05 s"):
            await soon(ingress.plane.connect(address, timeout_s=0.05))
        assert not patient.done()
        await soon(ingress.plane.close())
        with pytest.raises(PeerLost, match="closed"):
            await soon(patient)


async def test_listener_that_hangs_up_is_reported(net: TcpNet) -> None:
    ingress = await net.endpoint("ingress-0")

    async def hang_up(_wire: Wire) -> None: ...

    async with listening(hang_up) as address:
        with pytest.raises(PeerLost, match=r"silent@127\.0\.0\.1"):
            await soon(ingress.plane.connect(address))


@pytest.mark.parametrize("port", [0, 65536, 99999, -1])
async def test_address_with_an_impossible_port_is_nobodys(net: TcpNet, port: int) -> None:
    ingress = await net.endpoint("ingress-0")
    with pytest.raises(PeerLost, match="a port is 1 to 65535"):
        await soon(ingress.plane.connect(Address("127.0.0.1", port, "x", "1")))


async def test_host_that_does_not_exist_is_reported(net: TcpNet) -> None:
    ingress = await net.endpoint("ingress-0")
    with pytest.raises(PeerLost, match=r"x@no such host\.invalid:9"):
        await soon(ingress.plane.connect(Address("no such host.invalid", 9, "x", "1")))


# After it


async def test_peer_that_hangs_is_lost_after_the_ping_deadline(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    async with dialed(worker):
        await worker.until(lambda: worker.lost)
    assert "was silent for" in str(worker.lost[0][1])


async def test_quiet_peer_that_answers_pings_is_kept(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    async with dialed(worker) as wire:
        for _ in range(10):  # half a second: longer than the deadline
            ping = await wire.message()
            assert isinstance(ping, Ping)
            wire.send(encode(Pong(ping.number)))
        assert worker.lost == []
        assert worker.received == []


async def test_process_that_stood_still_itself_does_not_lose_its_peers(net: TcpNet) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    peer = await soon(ingress.plane.connect(worker.address))
    time.sleep(0.6)  # noqa: ASYNC251 - the loop must stand still for longer than the deadline
    peer.send(Drain("awake again"))
    await worker.until(lambda: worker.received)
    worker.received[0][0].send(Drain("me too"))
    await ingress.until(lambda: ingress.received)
    assert ingress.lost == worker.lost == []


async def test_a_life_that_seems_older_is_let_in_once_the_younger_one_is_long_gone(
    net: TcpNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingress = await net.endpoint("ingress-0")
    worker = await net.endpoint("worker-0", incarnation="2")
    await soon(ingress.plane.connect(worker.address))
    await soon(worker.plane.close())
    await ingress.until(lambda: ingress.lost)
    # Its host's clock was set back before it was started again.
    again = await net.endpoint("worker-0", incarnation="1")
    with pytest.raises(StaleIncarnation):
        await soon(ingress.plane.connect(again.address))
    monkeypatch.setattr(mesh, "FORGET_LIFE_S", 0.0)
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(StaleIncarnation):
                peer = await ingress.plane.connect(again.address)
                break
    assert peer.address == again.address


BAD_FRAMES = {
    "noise": (b"\xff" * 64, "no frame"),
    "a length of 100 MB": (struct.pack("<IB", 100_000_000, PROTOCOL_VERSION), "100000000 bytes"),
    "another version": (struct.pack("<IB", 2, PROTOCOL_VERSION + 1) + b"x", "version 2"),
    "an unknown message": (struct.pack("<IB", 4, PROTOCOL_VERSION) + b"\x91\xa1x", "no message"),
}


@pytest.mark.parametrize(("raw", "words"), BAD_FRAMES.values(), ids=BAD_FRAMES)
async def test_peer_that_sends_no_frames_is_lost_alone(net: TcpNet, raw: bytes, words: str) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    peer = await soon(ingress.plane.connect(worker.address))
    async with dialed(worker) as wire:
        wire.send(raw)
        await worker.until(lambda: worker.lost)
        await wire.ended()
    assert len(worker.lost) == 1
    assert words in str(worker.lost[0][1])
    peer.send(Drain("undisturbed"))
    await worker.until(lambda: worker.received)


async def test_peer_that_ends_inside_a_frame_is_lost_with_that_reason(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    async with dialed(worker) as wire:
        wire.send(encode(Drain("whole")) + encode(Drain("half"))[:-2])
    await worker.until(lambda: worker.lost)
    assert worker.words() == ["whole"]
    assert "ended inside a frame" in str(worker.lost[0][1])


async def test_memory_is_bounded_when_the_peer_stops_reading(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    async with dialed(worker):
        await worker.until(lambda: worker.plane.peer(STRANGER))
        peer = worker.plane.peer(STRANGER)
        assert peer is not None
        sent_bytes = 0
        with pytest.raises(PeerLost, match="does not read"):  # noqa: PT012 - one of many sends
            while sent_bytes < 100_000_000:
                peer.send(Drain("x" * 100_000))
                sent_bytes += 100_000
                await asyncio.sleep(0)
        await worker.until(lambda: worker.lost)
    # 4 MB is the limit; the kernel's two socket buffers hold the rest.
    assert sent_bytes < 20_000_000
    assert "does not read" in str(worker.lost[0][1])


async def test_one_loop_iteration_cannot_queue_more_than_the_limit(net: TcpNet) -> None:
    ingress, worker = await net.endpoint("ingress-0"), await net.endpoint("worker-0")
    peer = await soon(ingress.plane.connect(worker.address))
    with pytest.raises(PeerLost, match="does not read"):  # noqa: PT012 - one of many sends
        for _ in range(100):
            peer.send(Drain("x" * 100_000))
    await ingress.until(lambda: ingress.lost)


async def test_younger_life_ends_the_connections_of_the_older_one(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    older, younger = (Address("127.0.0.1", 1, "ingress-0", life) for life in ("18e9aa", "18e9bb"))
    async with dialed(worker, older) as old_wire, dialed(worker, younger):
        await worker.until(lambda: worker.lost)
        assert worker.lost[0][0].address == older
        assert "restarted as incarnation 18e9bb" in str(worker.lost[0][1])
        await old_wire.ended()
        assert worker.plane.peer(younger) is not None
        async with dialed(worker, me=None) as again:
            handshake = Handshake(older, SECRET, worker.address, {})
            again.send(handshake.opening())
            again.send(handshake.feed(await soon(again.reader.read(65536))))
            assert b"18e9aa" in await again.ended()


# The process's own end


async def test_process_may_connect_to_itself(net: TcpNet) -> None:
    only = await net.endpoint("both")
    peer = await soon(only.plane.connect(only.address))
    peer.send(Drain("echo"))
    await only.until(lambda: only.received)
    only.received[0][0].send(Drain("echo of the echo"))
    await only.until(lambda: len(only.received) == 2)


async def test_port_in_use_says_which(net: TcpNet) -> None:
    worker = await net.endpoint("worker-0")
    port = worker.address.port
    with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}.*in use"):
        await net.endpoint("worker-1", port=port)


def build(host: str = "127.0.0.1", secret: bytes = SECRET, **settings: float | str) -> TcpMesh:
    return TcpMesh(
        peer_id="worker-0",
        incarnation="1",
        secret=secret,
        host=host,
        on_message=lambda _peer, _message: None,
        on_lost=lambda _peer, _error: None,
        **settings,  # type: ignore[arg-type]  # each test passes what fits
    )


async def test_localhost_is_one_port() -> None:
    subject = build(host="localhost")
    await subject.start()
    assert (subject.address.host, subject.address.port > 0) == ("localhost", True)
    await soon(subject.close())


async def test_wildcard_host_needs_an_address_to_advertise() -> None:
    with pytest.raises(ConfigError, match="advertise"):
        build(host="0.0.0.0")
    subject = build(host="0.0.0.0", advertise_host="node-7")
    await subject.start()
    assert subject.address.host == "node-7"
    await soon(subject.close())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="secret is empty"):
        build(secret=b"")
    with pytest.raises(ConfigError, match="ping interval"):
        build(ping_interval_s=10.0, ping_deadline_s=10.0)


async def test_host_of_another_machine_cannot_be_listened_on() -> None:
    subject = build(host="192.0.2.1")
    with pytest.raises(StartError, match=r"cannot listen on 192\.0\.2\.1:0"):
        await subject.start()
    await soon(subject.close())


def test_incarnations_of_later_lives_compare_greater() -> None:
    lives = [new_incarnation() for _ in range(100)]
    by_time = [life[:16] for life in lives]
    assert by_time == sorted(by_time)
    assert len(set(lives)) == 100
    assert {len(life) for life in lives} == {24}


# uvloop: its transports differ in when they write, pause and raise

CONTRACT = [
    cast("Callable[[Net], Awaitable[None]]", test)
    for name, test in inspect.getmembers(test_request_plane, inspect.iscoroutinefunction)
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["net"]
]


@pytest.mark.parametrize(
    "test", CONTRACT, ids=lambda test: str(test.__name__).removeprefix("test_")
)
def test_contract_holds_on_uvloop(test: Callable[[Net], Awaitable[None]]) -> None:
    async def run() -> None:
        made = TcpNet()
        try:
            await test(made)
        finally:
            await made.close()

    uvloop.run(run())

"""What the ucx transport promises beyond the contract of all transports."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from tests.contract.transports import (
    DEADLINE_S,
    KINDS,
    ROOT,
    Stage,
    crc,
    encoded,
    ours,
    theirs,
)
from trtllm_workers.errors import TransferFailed, TransportUnavailable
from trtllm_workers.transfer.ucx import UcxTransport, probe
from trtllm_workers.transfer.ucx_card import (
    PeerProcess,
    UcxAddress,
    decode_address,
    started_ticks,
    this_host,
)
from trtllm_workers.transfer.ucx_notify import MAX_MESSAGE_BYTES
from trtllm_workers.transfer.ucx_pieces import SEGMENT_BYTES, Pieces, block_pieces
from trtllm_workers.transfer.ucx_worker import WINDOW

UCX = next(kind for kind in KINDS if kind.title == "ucx")
PRIVATE_HOST = "192.0.2.1"  # not loopback; nothing listens on it
SHORT_S = 0.4
LISTENING = "0A"

needs_ucxx = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"
)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    made = Stage(UCX, lambda: (tmp_path / f"out-{os.urandom(4).hex()}").open("w+b"))
    yield made
    await made.close()


def address_of(*, pid: int, ticks: int) -> UcxAddress:
    return UcxAddress(b"", b"", 0, b"", 0, b"", b"", this_host(), pid, ticks)


def listening_inodes() -> set[str]:
    """Return the inodes of all sockets that listen on a port, in this network namespace."""
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == LISTENING:
                found.add(fields[9])
    return found


def own_sockets() -> set[str]:
    """Return the inodes of this process's sockets."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


# What is there without ucxx


def test_importing_the_transport_imports_no_ucxx() -> None:
    program = "import sys, trtllm_workers.transfer.ucx; sys.exit('ucxx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 0


def block_ucxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", None)
    monkeypatch.delitem(sys.modules, "ucxx._lib", raising=False)
    monkeypatch.delitem(sys.modules, "ucxx._lib.libucxx", raising=False)


def test_probe_names_the_package_when_ucxx_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    block_ucxx(monkeypatch)
    with pytest.raises(TransportUnavailable, match=r"pip install 'trtllm-launch\[ucx\]'"):
        probe()


async def test_start_fails_and_close_is_safe_when_ucxx_is_missing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_ucxx(monkeypatch)
    with pytest.raises(TransportUnavailable, match="ucxx"):
        await stage.ours()


@needs_ucxx
def test_probe_is_content_when_ucxx_is_there() -> None:
    probe()


# Pieces and cards


def test_blocks_side_by_side_on_both_ends_are_one_piece() -> None:
    pieces = block_pieces([4, 5, 6, 9], [1, 2, 7, 8], 10, 1000, 2000)
    assert pieces == Pieces([1040, 1060, 1090], [2010, 2070, 2080], [20, 10, 10])


def test_a_block_that_follows_on_one_end_only_is_a_piece_of_its_own() -> None:
    assert block_pieces([0, 1], [0, 0], 8, 0, 0) == Pieces([0, 8], [0, 0], [8, 8])


def test_windows_hold_every_piece_once() -> None:
    pieces = Pieces([1, 2, 3], [4, 5, 6], [7, 8, 9])
    assert list(pieces.windows(2)) == [Pieces([1, 2], [4, 5], [7, 8]), Pieces([3], [6], [9])]


def test_a_long_piece_is_cut_at_the_end_of_a_window() -> None:
    long = 2 * SEGMENT_BYTES + 5
    pieces = Pieces([0, 10**6], [10**7, 10**8], [long, 6])
    assert list(pieces.windows(2)) == [
        Pieces([0], [10**7], [2 * SEGMENT_BYTES]),
        Pieces([2 * SEGMENT_BYTES, 10**6], [10**7 + 2 * SEGMENT_BYTES, 10**8], [5, 6]),
    ]


def test_an_address_of_another_transport_is_refused_by_name() -> None:
    with pytest.raises(TransferFailed, match="p7"):
        decode_address(msgspec.msgpack.encode({"port": 1}), "p7")


def test_a_process_is_gone_when_its_number_was_used_again() -> None:
    ticks = started_ticks(os.getpid())
    assert ticks is not None
    alive = PeerProcess(address_of(pid=os.getpid(), ticks=ticks))
    other = PeerProcess(address_of(pid=os.getpid(), ticks=ticks - 1))
    assert (alive.gone(), other.gone()) == (False, True)
    alive.close()
    other.close()


def test_a_process_is_gone_when_it_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    watched = PeerProcess(address_of(pid=child.pid, ticks=started_ticks(child.pid) or 0))
    assert not watched.gone()
    child.stdin.close()
    child.wait(timeout=20)
    assert watched.gone()
    watched.close()


def test_a_process_of_another_host_is_never_said_to_be_gone() -> None:
    elsewhere = msgspec.structs.replace(
        address_of(pid=os.getpid(), ticks=0), host=msgspec.structs.replace(this_host(), boot_id="x")
    )
    assert not PeerProcess(elsewhere).gone()


# Moving bytes


@needs_ucxx
async def test_64_mib_in_scattered_blocks_are_exact_both_ways(stage: Stage) -> None:
    sizes = {"num_blocks": 2048, "block_bytes": 32 * 1024}
    peer, link, pool = await stage.linked(**sizes)
    before = await peer.holds(range(2048))
    remote, local = list(range(2048)), list(range(2048))
    random.Random(1).shuffle(remote)
    random.Random(2).shuffle(local)
    await link.read(remote, local, DEADLINE_S)
    assert [crc(pool.block(block)) for block in local] == [before[block] for block in remote]
    await link.write(range(2048), range(2048), DEADLINE_S)
    assert await peer.holds(range(2048)) == [crc(pool.block(block)) for block in range(2048)]


@needs_ucxx
async def test_more_pieces_than_a_window_are_exact(stage: Stage) -> None:
    num_blocks = 2 * WINDOW + 7
    peer, link, pool = await stage.linked(num_blocks=num_blocks, block_bytes=256)
    before = await peer.holds(range(num_blocks))
    backwards = list(reversed(range(num_blocks)))
    await link.read(backwards, range(num_blocks), DEADLINE_S)
    assert [crc(pool.block(block)) for block in backwards] == before


@needs_ucxx
async def test_a_link_works_again_when_a_stopped_peer_goes_on(stage: Stage) -> None:
    peer, link, pool = await stage.linked()
    peer.stop()
    with pytest.raises(TransferFailed, match=r"peer.*not done within"):
        await link.read([1], [2], SHORT_S)
    peer.resume()
    await link.read([1], [2], DEADLINE_S)
    assert bytes(pool.block(2)) == theirs(1)


@needs_ucxx
async def test_a_reader_that_is_killed_leaves_our_transport_well(stage: Stage) -> None:
    transport, pool = await stage.ours(num_blocks=512)
    reader = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.unit.transfer.ucx_reader",
        encoded(transport.card()),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert reader.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await reader.stdout.readline() == b"reading\n"
        reader.kill()
        await reader.wait()
    other = await stage.peer("other")
    calm = await other.ask("connect", card=encoded(transport.card()), timeout_s=DEADLINE_S)
    await other.ask("write", link=calm, local=[3], remote=[4], timeout_s=DEADLINE_S)
    assert bytes(pool.block(4)) == theirs(3)
    assert bytes(pool.block(5)) == ours(5)


# Messages


@needs_ucxx
async def test_a_message_over_the_limit_is_refused_and_the_next_one_arrives(stage: Stage) -> None:
    peer, link, _ = await stage.linked()
    with pytest.raises(TransferFailed, match="over"):
        await link.notify(bytes(MAX_MESSAGE_BYTES + 1), DEADLINE_S)
    await link.notify(bytes(MAX_MESSAGE_BYTES), DEADLINE_S)
    [(who, _, _)] = await peer.ask("await_notes", count=1)
    assert who == "ours"


# The network


@needs_ucxx
async def test_on_a_loopback_host_no_port_is_open(stage: Stage) -> None:
    _, link, _ = await stage.linked()
    assert link.wire == "shm"
    assert not own_sockets() & listening_inodes()


@needs_ucxx
async def test_peers_of_one_host_meet_in_shared_memory_wherever_they_listen(stage: Stage) -> None:
    peer = await stage.peer(host=PRIVATE_HOST)
    transport, pool = await stage.ours(host=PRIVATE_HOST)
    link = await transport.connect(peer.card, DEADLINE_S)
    await link.read([1], [2], DEADLINE_S)
    assert bytes(pool.block(2)) == theirs(1)
    assert link.wire == "shm"


@needs_ucxx
async def test_no_port_is_open_when_the_operator_leaves_tcp_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "^tcp")
    peer = await stage.peer(host=PRIVATE_HOST)
    transport, _ = await stage.ours(host=PRIVATE_HOST)
    assert (await transport.connect(peer.card, DEADLINE_S)).wire == "shm"
    assert not own_sockets() & listening_inodes()


@needs_ucxx
async def test_without_any_wire_the_message_says_who_leaves_tcp_out(stage: Stage) -> None:
    transport, _ = await stage.ours(host=PRIVATE_HOST)
    with pytest.MonkeyPatch.context() as their_environment:
        their_environment.setenv("UCX_TLS", "self")
        peer = await stage.peer(host=PRIVATE_HOST)
    with pytest.raises(TransferFailed, match=r"peer.*it does not take part.*--kv-transport tcp"):
        await transport.connect(peer.card, DEADLINE_S)


@needs_ucxx
async def test_network_devices_that_do_not_exist_leave_the_rest_working(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "nosuch0")
    peer = await stage.peer(host=PRIVATE_HOST)
    with capture_logs() as logs:
        transport, _ = await stage.ours(host=PRIVATE_HOST)
    assert any("UCX_NET_DEVICES" in entry["event"] for entry in logs)
    assert (await transport.connect(peer.card, DEADLINE_S)).wire == "shm"


@needs_ucxx
async def test_two_transports_of_one_process_exchange_blocks(stage: Stage) -> None:
    first, one = await stage.ours(peer_id="one")
    second, two = await stage.ours(peer_id="two")
    two.block(5)[:] = bytes(two.layout.block_bytes)
    link = await first.connect(second.card(), DEADLINE_S)
    await asyncio.gather(*(link.read([5], [block], DEADLINE_S) for block in range(4)))
    assert bytes(one.block(3)) == bytes(one.layout.block_bytes)
    assert isinstance(first, UcxTransport)

"""Both ends of a ucx link between hosts, driven step by step: what lands, what is refused, what stops."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from structlog.testing import capture_logs

from tests.contract.transports import MARK, OURS, THEIRS, mark, marked
from tests.fakes.transport_peer import fill, make_layout, make_pool
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.ucx_card import UcxAddress, this_host
from trtllm_workers.transfer.ucx_native import Native, load
from trtllm_workers.transfer.ucx_net_channel import NetBatch, NetChannel
from trtllm_workers.transfer.ucx_net_server import NetServer
from trtllm_workers.transfer.ucx_pieces import PinnedBytes
from trtllm_workers.transfer.ucx_wires import choose_wires
from trtllm_workers.transfer.ucx_worker import WINDOW

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"
)
BLOCK_BYTES = 256 * 1024
NUM_BLOCKS = 48  # 12 MiB: more than two sockets hold
TOKEN = b"t" * 32
DEADLINE_S = 20.0
WITHIN_S = 0.3
TURN_S = 0.02


def options() -> dict[str, str]:
    messages = choose_wires("tcp", "lo", "192.0.2.1", [], []).messages
    assert messages is not None
    return {**messages, "NET_DEVICES": "lo"}


@dataclass
class Ends:
    """A pool with its server, and another with channels to it."""

    native: Native
    server: NetServer
    theirs: KvPool
    ours: KvPool
    notes: list[tuple[str, bytes]]
    _pinned: PinnedBytes = field(init=False)
    _channels: list[NetChannel] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pinned = PinnedBytes(self.ours.memory)

    def channel(self, token: bytes = TOKEN) -> NetChannel:
        address = UcxAddress(
            b"", b"", 0, b"", 0, b"", token, this_host(), os.getpid(), 0, self.server.address
        )
        made = NetChannel(self.native, options(), self._pinned, address, "asker")
        self._channels.append(made)
        return made

    def welcomed(self) -> NetChannel:
        channel = self.channel()
        assert through(channel, channel.start_hello()) == ""
        assert channel.hello_matches()
        return channel

    def move(
        self, channel: NetChannel, blocks: int, *, write: bool, within_s: float = DEADLINE_S
    ) -> NetBatch:
        pieces = channel.pieces(range(blocks), range(blocks), BLOCK_BYTES)
        [window] = pieces.windows(WINDOW)
        return channel.start(window, write=write, within_s=within_s)

    def close(self) -> None:
        for channel in self._channels:
            channel.close(peer_lives=True)
        self.server.close()
        self.server.close()
        self._pinned.release()


@pytest.fixture
def ends() -> Iterator[Ends]:
    loop = asyncio.new_event_loop()
    native = load()
    theirs, ours = (make_pool(NUM_BLOCKS, make_layout(BLOCK_BYTES)) for _ in range(2))
    fill(theirs, THEIRS)
    fill(ours, OURS)
    notes: list[tuple[str, bytes]] = []
    pinned = PinnedBytes(theirs.memory)
    server = NetServer(
        native, options(), pinned, TOKEN, lambda who, what: notes.append((who, what)), loop
    )
    made = Ends(native, server, theirs, ours, notes)
    yield made
    made.close()
    loop.run_until_complete(asyncio.sleep(0))
    pinned.release()
    loop.close()


def through(channel: NetChannel, batch: NetBatch) -> str:
    """Drive a batch to its end; return why it failed."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not batch.ended:
        assert time.monotonic() < deadline_s
        channel.drive(batch, TURN_S)
    return batch.failure


def until(met: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not met():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)  # the other end's thread goes on


def test_blocks_come_and_go(ends: Ends) -> None:
    channel = ends.welcomed()
    before = bytes(ends.theirs.memory)
    assert through(channel, ends.move(channel, NUM_BLOCKS, write=False)) == ""
    assert bytes(ends.ours.memory) == before
    mark(ends.ours)
    assert through(channel, ends.move(channel, 3, write=True)) == ""
    assert bytes(ends.theirs.memory) == MARK * 3 * BLOCK_BYTES + before[3 * BLOCK_BYTES :]
    assert channel.transports() == ("tcp",)


def test_whoever_has_no_token_is_not_answered(ends: Ends) -> None:
    with capture_logs() as logs:
        stranger = ends.channel(token=b"x" * 32)
        batch = stranger.start_hello()
        friend = ends.welcomed()  # after it, so the server has seen both
        stranger.drive(batch, TURN_S)
        until(lambda: any("without our token" in entry["event"] for entry in logs))
    assert not batch.ended
    assert not stranger.hello_matches()
    assert through(friend, ends.move(friend, 1, write=False)) == ""


def test_ranges_outside_the_pool_are_refused_and_nothing_moves(ends: Ends) -> None:
    channel = ends.welcomed()
    before = bytes(ends.theirs.memory)
    for write in (False, True):
        pieces = channel.pieces([0], [NUM_BLOCKS], BLOCK_BYTES)
        batch = channel.start(pieces, write=write, within_s=DEADLINE_S)
        assert "outside the pool" in through(channel, batch)
        channel.close(peer_lives=True)
        channel = ends.welcomed()
    assert bytes(ends.theirs.memory) == before


def test_a_writer_that_stands_still_until_its_deadline_writes_nothing_later(ends: Ends) -> None:
    channel = ends.welcomed()
    batch = ends.move(channel, NUM_BLOCKS, write=True, within_s=WITHIN_S)
    while batch.waits_for is None or batch.waits_for.__name__ == "Ready":
        channel.drive(batch, 0.0)  # until it has begun to send
    until(lambda: not ends.server._askers)
    mark(ends.theirs)
    while batch.requests:
        channel.drive(batch, TURN_S)  # it sends on, unaware
    again = ends.welcomed()
    assert through(again, ends.move(again, NUM_BLOCKS, write=False)) == ""
    assert marked(ends.theirs)
    assert not batch.ended, "nobody told it that all is there"


def test_a_reader_that_stands_still_until_its_deadline_is_let_go(ends: Ends) -> None:
    channel = ends.welcomed()
    batch = ends.move(channel, NUM_BLOCKS, write=False, within_s=WITHIN_S)
    channel.drive(batch, 0.0)
    until(lambda: not ends.server._askers and not ends.server._ending)
    channel.close(peer_lives=True)
    mark(ends.ours)
    again = ends.welcomed()
    assert through(again, again.start_notify(b"")) == ""
    assert marked(ends.ours)


def test_a_closed_channel_ends_its_connection_at_the_owner(ends: Ends) -> None:
    for write in (False, True):
        channel = ends.welcomed()
        batch = ends.move(channel, NUM_BLOCKS, write=write)
        channel.drive(batch, 0.0)
        channel.close(peer_lives=True)
        channel.close(peer_lives=True)
    until(lambda: not ends.server._askers and not ends.server._ending)


def test_a_channel_knows_when_the_owner_has_gone(ends: Ends) -> None:
    channel = ends.welcomed()
    assert not channel.broken()
    ends.server.close()
    until(channel.broken)

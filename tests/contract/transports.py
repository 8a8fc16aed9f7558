"""What the suite of KV transports needs: the kinds, peers that are processes, and our own end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest

from tests.fakes.transport_peer import fill, make_layout, make_pool, pattern
from trtllm_workers.errors import TransferFailed
from trtllm_workers.transfer.base import KvLink, KvPool, KvTransport
from trtllm_workers.transfer.registry import open_transport
from trtllm_workers.types import TransportCard

DEADLINE_S = 20.0
ROOT = Path(__file__).resolve().parents[2]
NUM_BLOCKS = 48
BLOCK_BYTES = 4096
SHORT_S = 0.4  # the deadline of what is meant to miss it
SLACK_S = 5.0  # a shared machine may let us wait that long beside it
BIG_BYTES = 256 * 1024
MARK = b"\xa5"
HOST_AT = 7  # where an address of ucx says which host it is of
OURS = 1  # seeds: what our pool holds in the beginning
THEIRS = 2


@dataclass(frozen=True)
class Kind:
    """One transport. Any of ``packages`` is needed; ``token_at`` is where an address has its token.

    ``environ`` makes it use one wire only, to peers at ``host``; such peers do not seem to run on this host, so
    that nobody sees the end of their processes.
    """

    name: str
    token_at: int
    packages: tuple[str, ...] = ()
    wire: str = ""
    host: str = "127.0.0.1"
    environ: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """What the tests call it."""
        return f"{self.name}-{self.wire}" if self.wire else self.name

    def seen_from_elsewhere(self, card: TransportCard) -> TransportCard:
        """Return the card as a peer on another host has it."""
        if not self.environ:
            return card
        address = msgspec.msgpack.decode(card.address)
        address[HOST_AT] = ["another-boot", 0]
        return msgspec.structs.replace(card, address=msgspec.msgpack.encode(address))

    def missing(self) -> str | None:
        """Return why this transport cannot be tested here, or None."""
        if importlib.util.find_spec(f"trtllm_workers.transfer.{self.name}") is None:
            return f"transport {self.name} is not part of this version"
        if self.packages and not any(map(importlib.util.find_spec, self.packages)):
            return f"none of {', '.join(self.packages)} is installed"
        return None


KINDS = (
    Kind("tcp", token_at=2),
    Kind("ucx", token_at=6, packages=("ucxx",)),
    Kind(
        "ucx",
        token_at=6,
        packages=("ucxx",),
        wire="tcp",
        host="192.0.2.1",  # not loopback, where ucx uses no network
        environ=(("UCX_TLS", "tcp"), ("UCX_NET_DEVICES", "lo")),
    ),
    Kind("nixl", token_at=2, packages=("nixl_cu12", "nixl_cu13")),
)


class Broken(Exception):
    """A peer's operation raised; ``kind`` is the error's class there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Peer:
    """A child process with a pool of the THEIRS pattern and a started transport."""

    def __init__(self, peer_id: str, output: IO[bytes]) -> None:
        self.peer_id = peer_id
        self.card: TransportCard
        self._output = output
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        self._heard = b""
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.transport_peer", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
            )

    async def start(self, kind: Kind, num_blocks: int, block_bytes: int, host: str) -> None:
        card = await self.ask(
            "start",
            transport=kind.name,
            peer_id=self.peer_id,
            host=host,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            seed=THEIRS,
        )
        self.card = kind.seen_from_elsewhere(
            msgspec.msgpack.decode(base64.b64decode(card), type=TransportCard)
        )

    async def order(self, do: str, **args: Any) -> None:
        """Send an order without waiting for its answer."""
        line = json.dumps({"do": do, **args}).encode() + b"\n"
        await asyncio.get_running_loop().sock_sendall(self._control, line)

    async def answer(self) -> Any:
        """Return the next answer. Raises Broken."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(DEADLINE_S):
            while b"\n" not in self._heard:
                more = await loop.sock_recv(self._control, 65536)
                assert more, f"{self.peer_id} ended"
                self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        said = json.loads(line)
        if "error" in said:
            raise Broken(said["error"], said["message"])
        return said["result"]

    async def ask(self, do: str, **args: Any) -> Any:
        """Let the peer do something and return the result."""
        await self.order(do, **args)
        return await self.answer()

    async def holds(self, block_ids: Sequence[int]) -> list[int]:
        """Return the checksums of blocks of the peer."""
        sums: list[int] = await self.ask("checksums", block_ids=list(block_ids))
        return sums

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        """Stop the process; it has stopped when this returns."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process; it is gone when this returns."""
        self.signal(signal.SIGKILL)
        self._process.wait()

    def printed(self) -> bytes:
        """Return what came on the peer's stdout."""
        self._output.seek(0)
        return self._output.read()

    def end(self) -> None:
        self._control.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()


class Stage:
    """Our end of one transport under test, and its peers; everything ends with ``close``."""

    def __init__(self, kind: Kind, output: Callable[[], IO[bytes]]) -> None:
        self.kind = kind
        self.notes: list[tuple[str, bytes]] = []
        self.noted = asyncio.Event()
        self._output = output
        self._peers: list[Peer] = []
        self._transports: list[KvTransport] = []

    async def ours(
        self,
        *,
        num_blocks: int = NUM_BLOCKS,
        block_bytes: int = BLOCK_BYTES,
        peer_id: str = "ours",
        host: str = "",
        **layout: Any,
    ) -> tuple[KvTransport, KvPool]:
        """Return a started transport with a pool of the OURS pattern."""
        pool = make_pool(num_blocks, make_layout(block_bytes, **layout))
        fill(pool, OURS)
        transport = self.opened(peer_id=peer_id, host=host)
        await transport.start(pool)
        return transport, pool

    def opened(self, *, peer_id: str = "ours", host: str = "") -> KvTransport:
        """Return a transport that has not been started."""

        def on_notify(who: str, message: bytes) -> None:
            self.notes.append((who, message))
            self.noted.set()

        transport = open_transport(
            self.kind.name, peer_id=peer_id, host=host or self.kind.host, on_notify=on_notify
        )
        self._transports.append(transport)
        return transport

    async def peer(
        self,
        peer_id: str = "peer",
        *,
        num_blocks: int = NUM_BLOCKS,
        block_bytes: int = BLOCK_BYTES,
        host: str = "",
    ) -> Peer:
        """Return a started child process."""
        peer = Peer(peer_id, self._output())
        self._peers.append(peer)
        await peer.start(self.kind, num_blocks, block_bytes, host or self.kind.host)
        return peer

    async def linked(
        self, *, num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES
    ) -> tuple[Peer, KvLink, KvPool]:
        """Return a peer, our link to it and our pool."""
        peer = await self.peer(num_blocks=num_blocks, block_bytes=block_bytes)
        transport, pool = await self.ours(num_blocks=num_blocks, block_bytes=block_bytes)
        return peer, await transport.connect(peer.card, DEADLINE_S), pool

    async def close(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            for transport in self._transports:
                await transport.close()
        for peer in self._peers:
            with contextlib.suppress(ProcessLookupError):
                peer.end()


def ours(block_id: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    return pattern(OURS, block_id, block_bytes)


def theirs(block_id: int, block_bytes: int = BLOCK_BYTES) -> bytes:
    return pattern(THEIRS, block_id, block_bytes)


def crc(content: bytes | memoryview) -> int:
    return zlib.crc32(content)


def encoded(card: TransportCard) -> str:
    """Return a card as a peer takes it."""
    return base64.b64encode(msgspec.msgpack.encode(card)).decode()


def with_other_token(kind: Kind, card: TransportCard) -> TransportCard:
    """Return the card with another token, and all else of its address as it was.

    So only the check of the token can refuse it.
    """
    address = msgspec.msgpack.decode(card.address)
    token = address[kind.token_at]
    assert len(token) >= 16
    address[kind.token_at] = os.urandom(len(token))
    return msgspec.structs.replace(card, address=msgspec.msgpack.encode(address))


def untouched(pool: KvPool, but: Set[int] = frozenset()) -> bool:
    """Return whether our pool still holds what it held, except for some blocks."""
    return all(
        bytes(pool.block(block_id)) == ours(block_id, pool.layout.block_bytes)
        for block_id in range(pool.num_blocks)
        if block_id not in but
    )


def mark(pool: KvPool) -> None:
    """Give the whole pool to somebody else."""
    pool.memory[:] = MARK * len(pool.memory)


def marked(pool: KvPool) -> bool:
    return bytes(pool.memory) == MARK * len(pool.memory)


async def fails(operation: Awaitable[object], within_s: float = DEADLINE_S) -> str:
    """Return the words of the TransferFailed that must come within a time."""
    began = time.monotonic()
    with pytest.raises(TransferFailed) as caught:
        await operation
    assert time.monotonic() - began < within_s + SLACK_S
    return str(caught.value)

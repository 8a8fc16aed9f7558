"""A process that owns a pool and does what it is told over a socket; the other end of a transport.

``python -m tests.fakes.transport_peer FD``: one JSON object per line comes in, one goes out. It ends
when the other side hangs up.
"""

from __future__ import annotations

import asyncio
import base64
import json
import mmap
import random
import socket
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog

from trtllm_workers.errors import TransferError
from trtllm_workers.transfer.base import KvLink, KvPool
from trtllm_workers.transfer.registry import open_transport
from trtllm_workers.types import KvLayout, TransportCard


def make_layout(block_bytes: int, **changes: Any) -> KvLayout:
    """Return a layout of ``block_bytes``; what the fields say beside it is free."""
    layout = KvLayout(
        num_layers=2,
        num_kv_heads=2,
        head_dim=16,
        block_size=32,
        dtype="float32",
        order="layer,kv,token,head,dim",
        block_bytes=block_bytes,
    )
    return msgspec.structs.replace(layout, **changes)


def make_pool(num_blocks: int, layout: KvLayout) -> KvPool:
    """Return a pool of zeros, its pages touched."""
    size = num_blocks * layout.block_bytes
    memory = memoryview(mmap.mmap(-1, size))
    for page in range(0, size, mmap.PAGESIZE):
        memory[page] = 0
    return KvPool(layout, num_blocks, memory)


def pattern(seed: int, block_id: int, block_bytes: int) -> bytes:
    """Return what block ``block_id`` of a pool filled with ``seed`` holds."""
    return random.Random(seed * 1_000_003 + block_id).randbytes(block_bytes)


def fill(pool: KvPool, seed: int) -> None:
    """Give every block of the pool its pattern."""
    for block_id in range(pool.num_blocks):
        pool.block(block_id)[:] = pattern(seed, block_id, pool.layout.block_bytes)


class Peer:
    """Does one thing after the other; notifications come whenever they come."""

    def __init__(self, say: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self.say = say
        self.notes: list[tuple[str, str, int]] = []
        self.noted = asyncio.Event()
        self.links: list[KvLink] = []

    def on_notify(self, peer_id: str, message: bytes) -> None:
        """Note who said what, and how the block that the message names looks at this moment."""
        looks = zlib.crc32(self.pool.block(int(message))) if message.isdigit() else 0
        self.notes.append((peer_id, base64.b64encode(message).decode(), looks))
        self.noted.set()

    async def start(
        self, transport: str, peer_id: str, host: str, num_blocks: int, block_bytes: int, seed: int
    ) -> str:
        self.pool = make_pool(num_blocks, make_layout(block_bytes))
        fill(self.pool, seed)
        self.transport = open_transport(
            transport, peer_id=peer_id, host=host, on_notify=self.on_notify
        )
        await self.transport.start(self.pool)
        return base64.b64encode(msgspec.msgpack.encode(self.transport.card())).decode()

    async def checksums(self, block_ids: list[int]) -> list[int]:
        return [zlib.crc32(self.pool.block(block_id)) for block_id in block_ids]

    async def await_notes(self, count: int) -> list[tuple[str, str, int]]:
        while len(self.notes) < count:
            self.noted.clear()
            await self.noted.wait()
        return self.notes

    async def cpu_s(self) -> float:
        return time.process_time()

    async def connect(self, card: str, timeout_s: float) -> int:
        decoded = msgspec.msgpack.decode(base64.b64decode(card), type=TransportCard)
        self.links.append(await self.transport.connect(decoded, timeout_s))
        return len(self.links) - 1

    async def write(self, link: int, local: list[int], remote: list[int], timeout_s: float) -> None:
        await self.links[link].write(local, remote, timeout_s)

    async def write_on(self, link: int, local: list[int], remote: list[int]) -> None:
        """Write again and again, until a write fails; tells of the first before it goes on."""
        await self.links[link].write(local, remote, 10.0)
        await self.say({"result": "writing"})
        while True:
            await self.links[link].write(local, remote, 10.0)

    async def close(self) -> None:
        await self.transport.close()


async def main(control: socket.socket) -> None:
    """Answer orders until the control connection ends."""
    reader, writer = await asyncio.open_connection(sock=control)

    async def say(answer: dict[str, Any]) -> None:
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()

    peer = Peer(say)
    while line := await reader.readline():
        order = json.loads(line)
        act = getattr(peer, order.pop("do"))
        try:
            await say({"result": await act(**order)})
        except TransferError as error:
            await say({"error": type(error).__name__, "message": str(error)})
    writer.close()


if __name__ == "__main__":
    # What is on stdout comes from a transport's library.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(socket.socket(fileno=int(sys.argv[1]))))

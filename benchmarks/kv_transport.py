"""Reads 64 MiB of KV blocks from a pool in another process, over each transport named.

    .venv/bin/python -m benchmarks.kv_transport ucx nixl tcp
    .venv/bin/python -m benchmarks.kv_transport ucx nixl tcp --in-order
    .venv/bin/python -m benchmarks.kv_transport ucx --block-kib 160 --mib 256 --runs 15

Between two hosts, each command on its own, with a file that both see (or that is copied):

    .venv/bin/python -m benchmarks.kv_transport ucx --host 10.0.0.1 --own card        # ends with Ctrl-C
    .venv/bin/python -m benchmarks.kv_transport ucx --host 10.0.0.2 --read-from card

Blocks are scattered at random on both sides, or with ``--in-order`` run side by side, as a pool that is
not fragmented hands them out. Pools ask for huge pages, as the torch engine's does. Beside the transports stands one copy of the same blocks
within this process (``memmove``, block by block and in one piece), measured before and after each
transport, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import mmap
import multiprocessing
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from trtllm_workers.transfer.base import KvPool
from trtllm_workers.transfer.registry import TRANSPORTS, open_transport
from trtllm_workers.types import KvLayout, TransportCard

DEADLINE_S = 60.0
HOST = "127.0.0.1"
OWNERS = 7  # what each byte of the owner's pool is


def make_pool(num_blocks: int, block_bytes: int, fill: int) -> KvPool:
    """Return a pool in private huge pages, where there are any, which have all been touched."""
    layout = KvLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=block_bytes // 64,
        block_size=16,
        dtype="bfloat16",
        order="layer,kv,token,head,dim",
        block_bytes=block_bytes,
    )
    pages = mmap.mmap(-1, num_blocks * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(pages)
    memory[:] = bytes([fill]) * len(memory)
    return KvPool(layout, num_blocks, memory)


def own(name: str, num_blocks: int, block_bytes: int, parent: Connection) -> None:
    """Own a pool until the parent hangs up."""

    async def until_the_end(card: TransportCard) -> None:
        parent.send(card)
        await asyncio.to_thread(parent.poll, None)

    asyncio.run(serve(name, num_blocks, block_bytes, HOST, until_the_end))


async def serve(
    name: str,
    num_blocks: int,
    block_bytes: int,
    host: str,
    until_the_end: Callable[[TransportCard], Awaitable[object]],
) -> None:
    """Own a pool until ``until_the_end`` ends; it is given the card."""
    pool = make_pool(num_blocks, block_bytes, fill=OWNERS)
    transport = open_transport(name, peer_id="owner", host=host, on_notify=lambda *_: None)
    try:
        await transport.start(pool)
        await until_the_end(transport.card())
    finally:
        await transport.close()


def copies_s(ours: KvPool, remote: list[int], local: list[int], runs: int) -> tuple[float, float]:
    """Return the median seconds of a copy block by block, and of one in one piece."""
    size = ours.layout.block_bytes
    other = make_pool(ours.num_blocks, size, fill=1)
    there = ctypes.addressof(ctypes.c_char.from_buffer(other.memory))
    here = ctypes.addressof(ctypes.c_char.from_buffer(ours.memory))
    by_block, whole = [], []
    for _ in range(runs):
        began = time.perf_counter()
        for theirs, mine in zip(remote, local, strict=True):
            ctypes.memmove(here + mine * size, there + theirs * size, size)
        by_block.append(time.perf_counter() - began)
    for _ in range(runs):
        began = time.perf_counter()
        ctypes.memmove(here, there, len(ours.memory))
        whole.append(time.perf_counter() - began)
    return statistics.median(by_block), statistics.median(whole)


async def measure(
    name: str,
    num_blocks: int,
    block_bytes: int,
    runs: int,
    *,
    host: str,
    card: Callable[[], Awaitable[TransportCard]],
    in_order: bool,
) -> None:
    """Print one row about reading from the owner of ``card``."""
    pool = make_pool(num_blocks, block_bytes, fill=0)
    transport = open_transport(name, peer_id="reader", host=host, on_notify=lambda *_: None)
    remote, local = list(range(num_blocks)), list(range(num_blocks))
    if not in_order:
        random.Random(1).shuffle(remote)
        random.Random(2).shuffle(local)
    try:
        await transport.start(pool)
        link = await transport.connect(await card(), DEADLINE_S)
        reads: list[float] = []
        writes: list[float] = []
        single: list[float] = []
        await link.read(remote, local, DEADLINE_S)
        if bytes(pool.memory) != bytes([OWNERS]) * len(pool.memory):
            raise AssertionError(f"{name} read wrong bytes")
        before = copies_s(pool, remote, local, runs)
        for _ in range(runs):
            began = time.perf_counter()
            await link.read(remote, local, DEADLINE_S)
            reads.append(time.perf_counter() - began)
        for _ in range(runs):
            began = time.perf_counter()
            await link.write(local, remote, DEADLINE_S)
            writes.append(time.perf_counter() - began)
        for _ in range(runs):
            began = time.perf_counter()
            await link.read(remote[:1], local[:1], DEADLINE_S)
            single.append(time.perf_counter() - began)
        after = copies_s(pool, remote, local, runs)
        by_block, whole = (min(a, b) for a, b in zip(before, after, strict=True))
        read, written = statistics.median(reads), statistics.median(writes)
        size = num_blocks * block_bytes / 2**30
        print(
            f"{name:<6}{link.wire:<22}{size / read:>9.2f}{size / min(reads):>9.2f}"
            f"{size / written:>9.2f}{size / by_block:>10.2f}{size / whole:>9.2f}"
            f"{by_block / read:>8.0%}{whole / read:>8.0%}"
            f"{statistics.median(single) * 1e3:>10.2f}"
        )
        await link.close()
    finally:
        await transport.close()


async def measure_here(
    name: str, num_blocks: int, block_bytes: int, runs: int, *, in_order: bool
) -> None:
    """Print one row about reading from a process of this host."""
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(target=own, args=(name, num_blocks, block_bytes, child))
    process.start()
    child.close()

    async def card() -> TransportCard:
        if not await asyncio.to_thread(parent.poll, DEADLINE_S):
            raise TimeoutError(f"the owner's {name} transport did not start")
        told: TransportCard = parent.recv()
        return told

    try:
        await measure(name, num_blocks, block_bytes, runs, host=HOST, card=card, in_order=in_order)
    finally:
        parent.close()
        process.join(DEADLINE_S)
        if process.is_alive():
            process.kill()
            process.join()


async def leave_card(path: Path, card: TransportCard) -> None:
    """Leave the card in a file, which only we may read: whoever has it may read the pool."""

    def write() -> None:
        path.touch(mode=0o600)
        path.write_bytes(msgspec.msgpack.encode(card))

    await asyncio.to_thread(write)
    print(f"{card.transport} serves; its card is in {path}", flush=True)
    await asyncio.Event().wait()


async def card_in(path: Path) -> TransportCard:
    """Return the card of a file."""
    return msgspec.msgpack.decode(await asyncio.to_thread(path.read_bytes), type=TransportCard)


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("transports", nargs="*", default=list(TRANSPORTS))
    parser.add_argument("--mib", type=int, default=64, help="what one read moves, in MiB")
    parser.add_argument("--block-kib", type=int, default=32, help="size of a block, in KiB")
    parser.add_argument("--runs", type=int, default=11, help="reads of which the median is shown")
    parser.add_argument("--in-order", action="store_true", help="blocks side by side")
    parser.add_argument("--host", default=HOST, help="between hosts: this one's address")
    parser.add_argument("--own", type=Path, metavar="FILE", help="serve, and leave the card there")
    parser.add_argument("--read-from", type=Path, metavar="FILE", help="read from who left it")
    chosen = parser.parse_args()
    num_blocks, block_bytes = chosen.mib * 1024 // chosen.block_kib, chosen.block_kib * 1024
    if chosen.own is not None:
        until_the_end = partial(leave_card, chosen.own)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(
                serve(chosen.transports[0], num_blocks, block_bytes, chosen.host, until_the_end)
            )
        return
    print(
        f"{'':<28}{'read':>9}{'best':>9}{'write':>9}{'memmove':>10}{'whole':>9}"
        f"{'of it':>8}{'whole':>8}{'1 block':>10}"
    )
    print(f"{'transport':<6} wire{'GiB/s from here to whole':>60}{'ms':>29}")
    for name in chosen.transports:
        sizes = (name, num_blocks, block_bytes, chosen.runs)
        if chosen.read_from is None:
            asyncio.run(measure_here(*sizes, in_order=chosen.in_order))
            continue
        card = partial(card_in, chosen.read_from)
        asyncio.run(measure(*sizes, host=chosen.host, card=card, in_order=chosen.in_order))


if __name__ == "__main__":
    main()

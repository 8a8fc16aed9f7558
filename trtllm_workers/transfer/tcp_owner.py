"""The owner's side of the tcp transport: answers reads, writes and notifications of its pool.

Runs on the event loop of the transport's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from trtllm_workers.errors import TransferFailed
from trtllm_workers.transfer import tcp_socket
from trtllm_workers.transfer.base import KvPool, OnNotify
from trtllm_workers.transfer.tcp_channel import Channel
from trtllm_workers.transfer.tcp_frames import (
    Done,
    Notify,
    Read,
    Ready,
    Write,
    refusal,
    unpack_ids,
)


async def serve_pool(
    pool: KvPool,
    on_notify: OnNotify,
    at_home: Callable[[Callable[[], object]], None],
    channel: Channel,
) -> None:
    """Answer one peer until its connection ends. ``at_home`` runs on_notify on the right loop.

    The deadline of a read or write holds here too, counted from when it was heard: when it is over
    the connection ends, and nothing of that write lands any more.
    """
    while True:
        asked = await channel.hear()
        match asked:
            case Read():
                async with asyncio.timeout(asked.timeout_s):
                    await _read(pool, asked, channel)
            case Write():
                async with asyncio.timeout(asked.timeout_s):
                    await _write(pool, asked, channel)
            case Notify():
                at_home(partial(on_notify, channel.peer_id, asked.message))
                await channel.say(Done())
            case _:
                raise TransferFailed(f"a {type(asked).__name__} out of turn")


async def _read(pool: KvPool, asked: Read, channel: Channel) -> None:
    block_ids = unpack_ids(asked.block_ids)
    if wrong := _outside(pool, block_ids):
        await channel.say(refusal(wrong))
        return
    await channel.say(Ready(), *tcp_socket.spans(pool, block_ids))


async def _write(pool: KvPool, asked: Write, channel: Channel) -> None:
    block_ids = unpack_ids(asked.block_ids)
    if wrong := _outside(pool, block_ids):
        await channel.say(refusal(wrong))
        return
    await channel.say(Ready())
    await tcp_socket.receive(channel.sock, tcp_socket.spans(pool, block_ids))
    await channel.say(Done())


def _outside(pool: KvPool, block_ids: tuple[int, ...]) -> str | None:
    highest = max(block_ids, default=0)
    if highest >= pool.num_blocks:
        return f"block {highest} is outside the pool of {pool.num_blocks}"
    return None

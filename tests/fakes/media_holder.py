"""A process that holds one item and lets others read it, for tests.

``python -m tests.fakes.media_holder TRANSPORT TOKENS``: it tells the item in one line (``item`` and the hex of
msgpack), and ends when its input does.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from tests.unit.worker.cluster import SECRET
from tests.unit.worker.media_stage import ROW_BYTES, fill, make_store, pattern
from trtllm_workers.planes.base import Peer
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import Message
from trtllm_workers.transfer.registry import open_transport
from trtllm_workers.types import MediaItem
from trtllm_workers.worker.media_desk import MediaDesk
from trtllm_workers.worker.media_meters import MediaMeters


async def main(name: str, num_tokens: int) -> None:
    store = make_store(num_tokens // 16 + 1, 16)
    transport = open_transport(
        name, peer_id="e0/media", host="127.0.0.1", on_notify=lambda _peer, _message: None
    )
    await transport.start(store.pool)
    desks: list[MediaDesk] = []

    def on_message(peer: Peer, message: Message) -> None:
        desks[0].on_message(peer, message)

    mesh = TcpMesh(
        peer_id="e0",
        incarnation=new_incarnation(),
        secret=SECRET,
        on_message=on_message,
        on_lost=lambda peer, error: desks[0].peer_lost(peer, error),
    )
    await mesh.start()
    desks.append(MediaDesk("e0", store, mesh, [transport], MediaMeters()))
    claim = store.claim(num_tokens * ROW_BYTES)
    fill(claim.runs, pattern(b"far", claim.num_bytes))
    item = MediaItem(b"f" * 16, 0, num_tokens, holder=mesh.address, num_bytes=claim.num_bytes)
    store.commit(claim, item)
    sys.stdout.write(f"item {msgspec.msgpack.encode(item).hex()}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await desks[0].close()
    await transport.close()
    await mesh.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))

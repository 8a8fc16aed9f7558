"""A process that reads another's whole pool over ucx again and again, until it is killed.

``python -m tests.unit.transfer.ucx_reader CARD``: it writes a line once the first read has ended.
"""

from __future__ import annotations

import asyncio
import base64
import sys

import msgspec

from tests.fakes.transport_peer import make_pool
from trtllm_workers.transfer.ucx import UcxTransport
from trtllm_workers.types import TransportCard


async def main() -> None:
    card = msgspec.msgpack.decode(base64.b64decode(sys.argv[1]), type=TransportCard)
    pool = make_pool(card.num_blocks, card.layout)
    transport = UcxTransport(peer_id="reader", host="127.0.0.1", on_notify=lambda *_: None)
    await transport.start(pool)
    link = await transport.connect(card, 10)
    backwards = range(card.num_blocks)[::-1]
    first = True
    while True:
        await link.read(range(card.num_blocks), backwards, 10)
        if first:
            sys.stdout.write("reading\n")
            sys.stdout.flush()
            first = False


if __name__ == "__main__":
    asyncio.run(main())

"""Workers that share a prefill queue, for tests. Holds no test."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.fakes.queue import MemoryQueue, MemoryQueueHub
from tests.unit.worker.cluster import (
    ACK_WAIT_S,
    DEADLINE_S,
    Cluster,
    Node,
)
from trtllm_workers.types import Role

ENGINES = ["sim", "torch"]


class Stage:
    """A cluster whose workers share one queue."""

    def __init__(self, made: Cluster, **hub: Any) -> None:
        self.made = made
        self.hub = MemoryQueueHub(**{"ack_wait_s": ACK_WAIT_S, **hub})

    async def add(self, role: Role, worker_id: str, **options: Any) -> Node:
        if role is not Role.AGGREGATED:
            options.setdefault("queue", MemoryQueue(self.hub))
        return await self.made.add(role, worker_id, **options)

    async def chain(self, *prefills: str, **options: Any) -> None:
        """Start an aggregated worker to compare with, prefill workers and a decode worker."""
        await self.add(Role.AGGREGATED, "a0")
        for prefill in prefills or ("p0",):
            await self.add(Role.PREFILL, prefill, **options)
        await self.add(Role.DECODE, "d0", **options)
        for prefill in prefills or ("p0",):
            await self.made.paired("d0", prefill)

    def jobs(self) -> dict[str, int]:
        return dict(self.made.nodes["d0"].service.meters.counts().queue_jobs)

    async def settled(self) -> None:
        """Wait until nobody holds a block, and the queue is empty."""
        await self.made.idle()
        async with asyncio.timeout(DEADLINE_S):
            while self.hub.kept:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.01)
        for node in self.made.nodes.values():
            assert node.held_blocks == 0
            assert node.service.meters.leaked_blocks == 0


def works(made: Cluster, name: str) -> bool:
    """Whether a prefill worker has a job."""
    node = made.nodes.get(name)
    end = node.service.queue_end if node is not None else None
    return end is not None and end.num_open > 0

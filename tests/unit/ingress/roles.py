"""Fake workers of prefill and decode roles, which tell about their pairs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from tests.unit.ingress.checkpoints import MODEL, record
from tests.unit.ingress.fakes import FakeWorker
from trtllm_workers.planes.messages import HandoffStats, Message, PairStats, StatsAsk, WorkerStats
from trtllm_workers.types import EngineStats, Role


class Worker(FakeWorker):
    """A fake of some role. A decode worker says that it has these prefill workers.

    ``info`` changes its EngineInfo, other fields its record. ``moves`` is how its pairs move KV:
    transport, wire, bytes and rate.
    """

    def __init__(
        self,
        checkpoint: Path,
        name: str,
        role: Role,
        *prefills: FakeWorker,
        info: dict[str, Any] | None = None,
        model: str = MODEL,
        moves: tuple[str, str, int, float] = ("ucx", "shm", 6_000_000, 6.0),
        **fields: Any,
    ) -> None:
        made = msgspec.structs.replace(
            record(checkpoint, name, model, **(info or {})), role=role, **fields
        )
        super().__init__(made)
        self.prefills = list(prefills)
        self._moves = moves

    def on_message(self, message: Message) -> None:
        super().on_message(message)
        if isinstance(message, StatsAsk):
            asyncio.get_running_loop().call_soon(self.tell)

    def tell(self, state: str = "ready", **handoffs: Any) -> None:
        """Report stats, with every pair in ``state``."""
        transport, wire, num_bytes, rate = self._moves
        pairs = [
            PairStats(
                one.record.address,
                transport,
                wire,
                state,
                "the reason",
                3,
                num_bytes,
                0.001,
                rate,
            )
            for one in self.prefills
        ]
        self.say(
            WorkerStats(self.record.worker_id, EngineStats(), 0, HandoffStats(**handoffs), pairs)
        )

"""The KV ledger: which requests hold blocks, and whether anybody still owns them. Moves nothing.

A block that no request returns is lost for the life of a worker, and a pool that leaks stands still
some day with every light green. So what the engine says it holds is compared, every few seconds,
with the requests that the worker knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import structlog

from trtllm_workers.engines.base import Engine
from trtllm_workers.worker.handoff_meters import HandoffMeters

log = structlog.get_logger(__name__)

# An end takes a moment to reach the engine: only what stays unowned for longer is a leak.
GRACE_S = 5.0


class Ledger:
    """Finds requests that hold blocks of ``engine`` that are not among ``owned()``.

    Each is told once with its request, counted in ``meters.leaked_blocks``, and then aborted, so that
    the pool gets its blocks back.
    """

    def __init__(
        self,
        engine: Engine,
        owned: Callable[[], Collection[str]],
        meters: HandoffMeters,
        *,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._owned = owned
        self._meters = meters
        self._grace_s = grace_s
        self._clock = clock
        self._suspects: dict[str, float] = {}

    async def check(self) -> dict[str, int]:
        """Look once; return the leaks found now: blocks by request id."""
        holdings = await self._engine.holdings()
        now_s = self._clock()
        owned = self._owned()
        unowned = {one: count for one, count in holdings.items() if one not in owned}
        self._suspects = {one: self._suspects.get(one, now_s) for one in unowned}
        leaks = {
            one: count
            for one, count in unowned.items()
            if now_s - self._suspects[one] >= self._grace_s
        }
        for request_id, num_blocks in leaks.items():
            self._meters.leaked_blocks += num_blocks
            log.error(
                "KV blocks leaked: no request owns them; they are taken back",
                request_id=request_id,
                blocks=num_blocks,
                unowned_s=round(now_s - self._suspects.pop(request_id), 1),
            )
            self._engine.abort(request_id)
        return leaks

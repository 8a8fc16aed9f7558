"""The router: one mode, one set of weights, a pool of workers for each kind and model."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable

from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.pool import Pool
from trtllm_workers.router.weights import Weights


class Router:
    """Pools by name. With ``uses_events`` False mode kv guesses from its own choices what is cached."""

    def __init__(
        self,
        mode: RouterMode = RouterMode.LEAST_LOADED,
        weights: Weights = Weights(),  # noqa: B008 - frozen
        *,
        uses_events: bool = True,
        now: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.mode = mode
        self.weights = weights
        self.follows_events = mode is RouterMode.KV and uses_events
        self._now = now
        self._rng = rng or random.Random()
        self._pools: dict[Hashable, Pool] = {}

    def pool(self, name: Hashable) -> Pool:
        """Return the pool of that name, made on first use."""
        pool = self._pools.get(name)
        if pool is None:
            pool = self._pools[name] = Pool(
                self.mode,
                self.weights,
                uses_events=self.follows_events,
                now=self._now,
                rng=self._rng,
            )
        return pool

    def drop(self, name: Hashable) -> None:
        """Forget a pool and all it knows."""
        self._pools.pop(name, None)

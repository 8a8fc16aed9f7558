"""What workers have to do: columns of numbers, by slot. Knows no name, no block and no policy.

A column is a standard array, so that a router that does not weigh costs needs no numpy; one that does
looks at the same memory through numpy (``kv.py``).
"""

from __future__ import annotations

from array import array

from trtllm_workers.types import EngineStats


class Loads:
    """Requests, prompt tokens and blocks at each worker: what it told, and what we have sent since.

    ``requests`` is what is there, never fewer than ours; ``ours`` are requests that we sent and that have
    not ended, ``others`` what a worker told beyond them (below 0: ours that it had not heard of),
    ``waiting`` our prompt tokens that are not computed yet, ``others_waiting`` requests of others that wait there, ``available`` blocks that are free or
    can be taken from the cache (infinite for a slot without worker), ``last_turns`` when it was last
    picked.
    """

    def __init__(self, size: int) -> None:
        self.size = 0
        self.requests = self.ours = self.others = array("d")
        self.waiting = self.others_waiting = self.available = self.last_turns = array("d")
        self.grow(size)

    def grow(self, size: int) -> None:
        """Make room for more slots, in new arrays."""
        more = size - self.size
        zeros, infinite = array("d", bytes(8 * more)), array("d", [float("inf")]) * more
        self.requests = self.requests + zeros
        self.ours = self.ours + zeros
        self.others = self.others + zeros
        self.waiting = self.waiting + zeros
        self.others_waiting = self.others_waiting + zeros
        self.last_turns = self.last_turns + zeros
        self.available = self.available + infinite
        self.size = size

    def add(self, number: int, num_blocks: int) -> None:
        """Begin with a worker that has nothing to do."""
        self.available[number] = float(num_blocks)

    def remove(self, number: int) -> None:
        """Forget a worker."""
        for column in (self.requests, self.ours, self.others, self.waiting, self.others_waiting):
            column[number] = 0.0
        self.last_turns[number] = 0.0
        self.available[number] = float("inf")

    def told(self, number: int, stats: EngineStats) -> None:
        """Take what a worker tells."""
        ours = self.ours[number]
        self.others[number] = stats.num_running + stats.num_waiting - ours
        self.others_waiting[number] = max(0.0, stats.num_waiting - ours)
        self.available[number] = stats.free_blocks + stats.cached_blocks
        self._count(number)

    def _count(self, number: int) -> None:
        self.requests[number] = self.ours[number] + max(0.0, self.others[number])

    def sent(self, number: int, tokens: int, blocks: int) -> None:
        """A request went there, with so many tokens to compute and blocks to fill."""
        self.ours[number] += 1.0
        self.waiting[number] += tokens
        self.available[number] -= blocks
        self._count(number)

    def computed(self, number: int, tokens: int) -> None:
        """A prompt is computed."""
        self.waiting[number] = max(0.0, self.waiting[number] - tokens)

    def ended(self, number: int, blocks: int) -> None:
        """A request has left; the blocks that it filled can be taken from the cache now."""
        self.available[number] += blocks
        self.ours[number] = max(0.0, self.ours[number] - 1.0)
        self._count(number)

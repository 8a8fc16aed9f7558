"""What workers have to do: columns of numbers, by slot. Knows no name, no block and no policy.

A column is a standard array, so that a router that does not weigh costs needs no numpy; one that does
looks at the same memory through numpy (``kv.py``).
"""

from __future__ import annotations

from array import array

from trtllm_workers.types import EngineStats


class Loads:
    """Requests, prompt tokens and blocks at each worker: what it told, and what we have sent since.

    ``ours`` are requests that we sent and that have not ended, ``others`` what a worker told beyond
    them (below 0: ours that it had not heard of), ``waiting`` our prompt tokens that are not computed
    yet, ``others_waiting`` requests of others that wait there, ``available`` blocks that are free or
    can be taken from the cache (infinite for a slot without worker), ``last_turns`` when it was last
    picked.
    """

    def __init__(self, size: int) -> None:
        self.size = 0
        self.ours = self.others = self.waiting = self.others_waiting = array("d")
        self.available = self.last_turns = array("d")
        self.grow(size)

    def grow(self, size: int) -> None:
        """Make room for more slots, in new arrays."""
        more = size - self.size
        self.ours, self.others, self.waiting, self.others_waiting, self.last_turns = (
            old + array("d", bytes(8 * more))
            for old in (self.ours, self.others, self.waiting, self.others_waiting, self.last_turns)
        )
        self.available = self.available + array("d", [float("inf")]) * more
        self.size = size

    def add(self, number: int, num_blocks: int) -> None:
        """Begin with a worker that has nothing to do."""
        self.available[number] = float(num_blocks)

    def remove(self, number: int) -> None:
        """Forget a worker."""
        for column in (self.ours, self.others, self.waiting, self.others_waiting, self.last_turns):
            column[number] = 0.0
        self.available[number] = float("inf")

    def told(self, number: int, stats: EngineStats) -> None:
        """Take what a worker tells."""
        ours = self.ours[number]
        self.others[number] = stats.num_running + stats.num_waiting - ours
        self.others_waiting[number] = max(0.0, stats.num_waiting - ours)
        self.available[number] = stats.free_blocks + stats.cached_blocks

    def requests(self, number: int) -> float:
        """Return the requests at a worker: never fewer than ours."""
        others = self.others[number]
        return self.ours[number] + others if others > 0.0 else self.ours[number]

    def sent(self, number: int, tokens: int, blocks: int) -> None:
        """A request went there, with so many tokens to compute and blocks to fill."""
        self.ours[number] += 1.0
        self.waiting[number] += tokens
        self.available[number] -= blocks

    def computed(self, number: int, tokens: int) -> None:
        """A prompt is computed."""
        self.waiting[number] = max(0.0, self.waiting[number] - tokens)

    def ended(self, number: int) -> None:
        """A request has left."""
        self.ours[number] = max(0.0, self.ours[number] - 1.0)

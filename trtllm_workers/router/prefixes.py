"""What workers hold, from their KV events and from what was sent to them. Knows no name and no load."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trtllm_workers.router.expected import Expectation, Expected
from trtllm_workers.router.index import BlockIndex, Chain, match
from trtllm_workers.types import KvEvent, KvEventKind


class Prefixes:
    """Blocks that workers hold, by slot; and those that they are expected to.

    With events an expected block counts until the worker tells of it, or a moment after the request has
    ended; without, until ``ttl_s`` after its last use.
    """

    def __init__(self, *, uses_events: bool, ttl_s: float, now: Callable[[], float]) -> None:
        self._index = BlockIndex()
        self._expected = Expected(math.inf if uses_events else ttl_s)
        self._uses_events = uses_events
        self._now = now
        # Of the last event; a slot without one holds nobody knows what.
        self._seqs: dict[int, int] = {}

    def remove(self, slot: int) -> None:
        """Forget a worker."""
        self._index.clear(slot)
        self._expected.forget(slot)
        self._seqs.pop(slot, None)

    def is_known(self, slot: int) -> bool:
        """Return whether a snapshot has come and nothing is missing since."""
        return slot in self._seqs

    def num_held(self, slot: int) -> int:
        """Return how many blocks a worker is known to hold."""
        return self._index.num_held(slot)

    def apply(self, slot: int, events: Sequence[KvEvent]) -> bool:
        """Take KV events; False when one is missing before these.

        Sequence numbers alone tell a gap. The removal of a block that was never heard of is none: that it
        is not there is what counts.
        """
        index, expected, seqs = self._index, self._expected, self._seqs
        for event in events:
            seq = event.seq
            if event.kind is KvEventKind.CLEARED:
                # Whatever was missed before it is gone as well.
                index.clear(slot)
                seqs[slot] = seq
                continue
            last = seqs.get(slot)
            if last is None:
                return False
            if seq == last + 1:
                seqs[slot] = seq
            elif seq > last:
                self.remove(slot)
                return False
            elif seq < last:
                continue  # it came before
            # One of the same number belongs to the snapshot, or comes again and changes nothing.
            if event.kind is KvEventKind.STORED:
                index.store(slot, event.block_hashes)
            else:
                index.remove(slot, event.block_hashes)
            expected.settle(slot, event.block_hashes)
        return True

    def match(self, chain: Chain, among: int) -> list[tuple[int, int]]:
        """Return how many leading blocks of a prompt workers have; see ``index.match``."""
        self._expected.expire(self._now())
        return match(chain, self._index, self._expected.index, among)

    def expect(self, slot: int, chain: Chain, limit: int) -> Expectation:
        """Expect the blocks of a prompt that was sent to a worker of ``limit`` blocks."""
        missing = self._index.missing(slot, chain.all())
        return self._expected.expect(slot, missing, self._now(), max(1, limit))

    def ended(self, expectation: Expectation, was_computed: bool) -> None:
        """Take notice that the request of an expectation has ended."""
        if not was_computed:
            self._expected.drop(expectation)
        elif self._uses_events:
            self._expected.drop_later(expectation, self._now())

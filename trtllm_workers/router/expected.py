"""Blocks that workers are expected to hold: of prompts that were sent there and not yet heard of.

Between a choice and the event that confirms it lie tens of milliseconds, in which the next request of
the same chat may come. Without events this is all that is known. Knows no clock of its own.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trtllm_workers.router.index import BlockIndex

_LOOKS_PER_TTL = 10
# What a worker has not told of a request so long after its end, it will not tell.
GRACE_S = 3.0


@dataclass(eq=False, slots=True)
class Expectation:
    """What is expected of one prompt at one worker."""

    slot: int
    blocks: Sequence[bytes]
    until_s: float


class Expected:
    """Blocks by slot, each until ``ttl_s`` after it was last expected; the oldest go first.

    Of one prompt the last blocks go first: the first ones are of use without them.
    """

    def __init__(self, ttl_s: float) -> None:
        self.index = BlockIndex()
        self._ttl_s = ttl_s
        self._look_again_s = 0.0
        self._by_slot: dict[int, OrderedDict[bytes, Expectation]] = {}
        self._leaving: deque[tuple[float, Expectation]] = deque()

    def expect(self, slot: int, blocks: Sequence[bytes], now_s: float, limit: int) -> Expectation:
        """Expect blocks at a slot, which holds at most ``limit`` of them."""
        made = Expectation(slot, blocks, now_s + self._ttl_s)
        if not blocks:
            return made
        expected = self._by_slot.setdefault(slot, OrderedDict())
        for block in reversed(blocks):
            if block in expected:
                expected.move_to_end(block)
            expected[block] = made
        self.index.store(slot, blocks)
        if len(expected) > limit:
            surplus = range(len(expected) - limit)
            self.index.remove(slot, [expected.popitem(last=False)[0] for _ in surplus])
        return made

    def settle(self, slot: int, blocks: Iterable[bytes]) -> None:
        """Expect these blocks no longer: what is true of them is known."""
        expected = self._by_slot.get(slot)
        if expected:
            gone = [block for block in blocks if expected.pop(block, None) is not None]
            if gone:
                self.index.remove(slot, gone)

    def drop(self, expectation: Expectation) -> None:
        """Give up an expectation, but for blocks that were expected anew since."""
        expected = self._by_slot.get(expectation.slot)
        if expected:
            gone = [one for one in expectation.blocks if expected.get(one) is expectation]
            for block in gone:
                del expected[block]
            self.index.remove(expectation.slot, gone)

    def drop_later(self, expectation: Expectation, now_s: float) -> None:
        """Give it up after a grace, in which the worker may still tell."""
        if expectation.blocks:
            self._leaving.append((now_s + GRACE_S, expectation))

    def forget(self, slot: int) -> None:
        """Expect nothing of a slot."""
        if self._by_slot.pop(slot, None) is not None:
            self.index.clear(slot)

    def expire(self, now_s: float) -> None:
        """Drop what has not come in time; looks at all slots ten times in a time to live at most."""
        while self._leaving and self._leaving[0][0] <= now_s:
            self.drop(self._leaving.popleft()[1])
        if now_s < self._look_again_s:
            return
        self._look_again_s = now_s + self._ttl_s / _LOOKS_PER_TTL
        for slot, expected in self._by_slot.items():
            old = []
            while expected:
                block, expectation = next(iter(expected.items()))
                if expectation.until_s > now_s:
                    break
                old.append(block)
                del expected[block]
            if old:
                self.index.remove(slot, old)

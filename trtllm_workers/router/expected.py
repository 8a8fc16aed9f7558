"""Blocks that workers are expected to hold: of prompts that were sent there and not yet heard of.

Between a choice and the event that confirms it lie tens of milliseconds, in which the next request of
the same chat may come. Without events this is all that is known. Knows no clock of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from trtllm_workers.router.index import BlockIndex

_LOOKS_PER_TTL = 10


class Expected:
    """Blocks by slot, each until ``ttl_s`` after it was last expected; the oldest go first."""

    def __init__(self, ttl_s: float) -> None:
        self.index = BlockIndex()
        self._ttl_s = ttl_s
        self._look_again_s = 0.0
        self._until: dict[int, OrderedDict[bytes, float]] = {}

    def expect(self, slot: int, blocks: Iterable[bytes], now_s: float, limit: int) -> None:
        """Expect blocks at a slot, which holds at most ``limit`` of them."""
        until = self._until.setdefault(slot, OrderedDict())
        new = []
        for block in blocks:
            if block in until:
                until.move_to_end(block)
            else:
                new.append(block)
            until[block] = now_s + self._ttl_s
        self.index.store(slot, new)
        if len(until) > limit:
            self._drop(slot, [until.popitem(last=False)[0] for _ in range(len(until) - limit)])

    def settle(self, slot: int, blocks: Iterable[bytes]) -> None:
        """Expect these blocks no longer: what is true of them is known, or they will not come."""
        until = self._until.get(slot)
        if until:
            gone = [block for block in blocks if until.pop(block, None) is not None]
            if gone:
                self._drop(slot, gone)

    def forget(self, slot: int) -> None:
        """Expect nothing of a slot."""
        if self._until.pop(slot, None) is not None:
            self.index.clear(slot)

    def expire(self, now_s: float) -> None:
        """Drop what has not come in time; looks ten times in a time to live at most."""
        if now_s < self._look_again_s:
            return
        self._look_again_s = now_s + self._ttl_s / _LOOKS_PER_TTL
        for slot, until in self._until.items():
            old = []
            while until:
                block, at_s = next(iter(until.items()))
                if at_s > now_s:
                    break
                old.append(block)
                del until[block]
            if old:
                self._drop(slot, old)

    def _drop(self, slot: int, blocks: list[bytes]) -> None:
        self.index.remove(slot, blocks)

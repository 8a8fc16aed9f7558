"""Workers of one model and one kind, and which of them takes the next request.

Each worker has a slot: a number in the columns of loads and a bit in the index of blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtllm_workers.router import policies
from trtllm_workers.router.choice import Choice, Row
from trtllm_workers.router.expected import Expectation
from trtllm_workers.router.loads import Loads
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.prefixes import Prefixes
from trtllm_workers.router.query import Query
from trtllm_workers.router.weights import Weights
from trtllm_workers.types import Address, EngineStats, KvEvent, WorkerRecord

if TYPE_CHECKING:
    from trtllm_workers.router.cost import Mask
    from trtllm_workers.router.kv import KvPolicy

__all__ = ["Charge", "Choice", "Pool", "Query", "Row"]

_FIRST_SLOTS = 8
_CANDIDATES_KEPT = 1024


@dataclass(eq=False, slots=True)
class _Slot:
    """A worker's place in the pool, as long as it stays; its number then goes to another."""

    number: int
    record: WorkerRecord


class Charge:
    """A request on its way at a worker, until it has ended. Both calls do nothing the second time."""

    __slots__ = ("_computed", "_ended", "_expectation", "_pool", "_slot", "_uncached")

    def __init__(
        self, pool: Pool, slot: _Slot | None, uncached: int, expectation: Expectation | None
    ) -> None:
        self._pool = pool
        self._slot = slot
        self._uncached = uncached
        self._expectation = expectation
        self._computed = self._ended = False

    def computed(self) -> None:
        """The prompt is computed: a first token was seen."""
        if not (self._computed or self._ended):
            self._computed = True
            number = self._pool.number_of(self._slot)
            if number is not None:
                self._pool.loads.computed(number, self._uncached)

    def ended(self) -> None:
        """The request is not at the worker any more."""
        if self._ended:
            return
        self._ended = True
        number = self._pool.number_of(self._slot)
        if number is None:
            return
        if not self._computed:
            self._pool.loads.computed(number, self._uncached)
        new_blocks = len(self._expectation.blocks) if self._expectation is not None else 0
        self._pool.loads.ended(number, new_blocks)
        if self._expectation is not None:
            self._pool.prefixes.ended(self._expectation, self._computed)


@dataclass(slots=True)
class _Candidates:
    """Open workers that a request may go to. ``mask`` is made when mode kv first looks at them."""

    numbers: tuple[int, ...]
    bits: int
    mask: Mask | None = None


class Pool:
    """Gives requests to workers. ``rng`` and ``now`` are the router's."""

    def __init__(
        self,
        mode: RouterMode,
        weights: Weights,
        *,
        uses_events: bool,
        now: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._mode = mode
        self._rng = rng
        self._slots: dict[Address, _Slot] = {}
        self._records: list[WorkerRecord | None] = [None] * _FIRST_SLOTS
        self._open: set[Address] = set()
        self._candidates: dict[frozenset[Address] | None, _Candidates] = {}
        self._turn = 0
        self.loads = Loads(_FIRST_SLOTS)
        self.prefixes = Prefixes(uses_events=uses_events, ttl_s=weights.ttl_s, now=now)
        self._kv: KvPolicy | None = None
        if mode is RouterMode.KV:
            # Only this mode needs numpy.
            from trtllm_workers.router.kv import KvPolicy

            self._kv = KvPolicy(self.loads, weights, rng)

    # --- workers -------------------------------------------------------------------------------

    def update(self, records: Collection[WorkerRecord]) -> None:
        """Take the full set of workers; another incarnation is another worker, which holds nothing."""
        fresh = {record.address: record for record in records}
        for address in [address for address in self._slots if address not in fresh]:
            self._remove(address)
        for address, record in fresh.items():
            slot = self._slots.get(address)
            if slot is None:
                slot = self._slots[address] = _Slot(self._free_number(), record)
                self.loads.add(slot.number, record.engine.num_blocks)
            slot.record = self._records[slot.number] = record

    def _free_number(self) -> int:
        if None not in self._records:
            self._records += [None] * len(self._records)
            self.loads.grow(len(self._records))
            self._candidates.clear()
        return self._records.index(None)

    def _remove(self, address: Address) -> None:
        self.set_open(address, False)
        number = self._slots.pop(address).number
        self._records[number] = None
        self.loads.remove(number)
        self.prefixes.remove(number)

    def number_of(self, slot: _Slot | None) -> int | None:
        """Return the number of a slot whose worker is still there."""
        if slot is None or self._slots.get(slot.record.address) is not slot:
            return None
        return slot.number

    def set_open(self, address: Address, is_open: bool) -> None:
        """Note whether a worker takes new requests; one that is new does not until told."""
        if address in self._slots and (address in self._open) != is_open:
            self._open ^= {address}
            self._candidates.clear()

    def told(self, address: Address, stats: EngineStats) -> None:
        """Take what a worker tells about its load."""
        slot = self._slots.get(address)
        if slot is not None:
            self.loads.told(slot.number, stats)

    # --- what they hold ------------------------------------------------------------------------

    def has_snapshot(self, address: Address) -> bool:
        """Return whether it is known what a worker holds."""
        slot = self._slots.get(address)
        return slot is not None and self.prefixes.is_known(slot.number)

    def num_blocks(self, address: Address) -> int:
        """Return how many blocks a worker is known to hold."""
        slot = self._slots.get(address)
        return self.prefixes.num_held(slot.number) if slot is not None else 0

    def apply(self, address: Address, events: Sequence[KvEvent]) -> bool:
        """Take KV events of a worker, in order.

        False: one is missing before these. What the worker holds is then not known, and counts for
        nothing, until a snapshot comes; the caller asks for it. Events that came before are ignored,
        and so are those of a worker that has left.
        """
        slot = self._slots.get(address)
        return slot is None or self.prefixes.apply(slot.number, events)

    # --- requests ------------------------------------------------------------------------------

    def place(
        self,
        query: Query,
        *,
        allowed: Collection[Address] | None = None,
        exclude: Address | None = None,
    ) -> Choice | None:
        """Return the worker for a prompt; None when no open one is among ``allowed``."""
        among = self._among(allowed)
        if exclude in self._open:
            barred = self._slots[exclude].number
            numbers = tuple(number for number in among.numbers if number != barred)
            among = _Candidates(numbers, among.bits & ~(1 << barred))
        if not among.numbers:
            return None
        if self._kv is None:
            number, choice = self._next(query, among.numbers)
        else:
            number, choice = self._cheapest(self._kv, query, among)
        self._turn += 1
        self.loads.last_turns[number] = self._turn
        return choice

    def _among(self, allowed: Collection[Address] | None) -> _Candidates:
        """Return the open workers among those allowed; kept until a worker opens or closes."""
        key = allowed
        if key is not None and not isinstance(key, frozenset):
            key = frozenset(key)
        found = self._candidates.get(key)
        if found is None:
            open_ones = self._open if key is None else self._open & key
            numbers = sorted(self._slots[address].number for address in open_ones)
            if len(self._candidates) >= _CANDIDATES_KEPT:
                self._candidates.clear()
            bits = sum(1 << number for number in numbers)
            found = self._candidates[key] = _Candidates(tuple(numbers), bits)
        return found

    def _next(self, query: Query, numbers: Sequence[int]) -> tuple[int, Choice]:
        """Return a worker without regard to what is cached."""
        loads, count = self.loads, len(numbers)
        if self._mode is RouterMode.RANDOM:
            number, why = policies.pick_random(numbers, self._rng), f"drawn from {count}"
        elif self._mode is RouterMode.ROUND_ROBIN:
            number = policies.round_robin(numbers, loads.last_turns)
            why = f"its turn among {count}"
        else:
            number = policies.least_loaded(numbers, loads.requests, loads.last_turns)
            why = f"fewest requests ({loads.requests[number]:.0f})"
        record = self._record(number)
        return number, Choice(
            record.address,
            record.worker_id,
            self._mode,
            0,
            len(query.prompt_token_ids),
            loads.requests[number],
            why,
        )

    def _cheapest(self, kv: KvPolicy, query: Query, among: _Candidates) -> tuple[int, Choice]:
        if among.mask is None:
            among.mask = kv.mask(among.numbers)
        # All workers of a pool serve one model; one with blocks of another size finds nothing cached.
        engine = self._record(among.numbers[0]).engine
        groups = self.prefixes.match(query.chain(engine.model_id, engine.block_size), among.bits)
        prompt_tokens = len(query.prompt_token_ids)
        return kv.choose(groups, among.mask, self._records, engine.block_size, prompt_tokens)

    def _record(self, number: int) -> WorkerRecord:
        record = self._records[number]
        assert record is not None, "an open slot has its worker"
        return record

    def charge(self, choice: Choice, query: Query) -> Charge:
        """Take notice that the request was sent to the worker of ``choice``."""
        slot = self._slots.get(choice.address)
        uncached = choice.prompt_tokens - choice.overlap_tokens
        if slot is None:  # it left in between: nothing to keep books of
            return Charge(self, None, uncached, None)
        number, expectation, num_new = slot.number, None, 0
        if self._kv is not None:
            engine = slot.record.engine
            chain = query.chain(engine.model_id, engine.block_size)
            expectation = self.prefixes.expect(number, chain, engine.num_blocks)
            num_new = len(expectation.blocks)
        self.loads.sent(number, uncached, num_new)
        return Charge(self, slot, uncached, expectation)

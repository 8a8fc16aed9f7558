"""Workers of one model and one kind, and which of them takes the next request.

Each worker has a slot: a column in the arrays of loads and a bit in the index of blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from trtllm_workers.router import policies
from trtllm_workers.router.cost import Bools, Costs, Floats, Loads, Weights, costs
from trtllm_workers.router.expected import Expected
from trtllm_workers.router.index import BlockIndex, match
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.query import Query
from trtllm_workers.types import (
    Address,
    EngineInfo,
    EngineStats,
    KvEvent,
    KvEventKind,
    WorkerRecord,
)

__all__ = ["Charge", "Choice", "Pool", "Query", "Row"]

_NUM_ROWS = 3
_MASKS_KEPT = 4096
# An event that has not come so long after its prompt was sent will not: the prompt waited, or was dropped.
_EVENT_TTL_S = 30.0


class Row(msgspec.Struct, frozen=True, gc=False):
    """One worker as a decision saw it. Tokens are the prompt's; ``waiting_tokens`` those before it."""

    worker_id: str
    overlap_tokens: int
    uncached_tokens: int
    waiting_tokens: int
    running: int
    free_blocks: int
    cost: float
    capped: bool


class Choice(msgspec.Struct, frozen=True):
    """The worker for a request, and why: ``rows`` are it and the next best ones."""

    address: Address
    worker_id: str
    mode: RouterMode
    overlap_tokens: int
    prompt_tokens: int
    cost: float
    reason: str
    rows: tuple[Row, ...] = ()


@dataclass(slots=True, eq=False)
class _Slot:
    """One worker. ``seq`` is the last event's; None: what it holds is not known."""

    number: int
    record: WorkerRecord
    seq: int | None = None
    in_snapshot: bool = False


class Charge:
    """A request on its way at a worker, until it has ended."""

    __slots__ = ("_blocks", "_computed", "_ended", "_pool", "_slot", "_uncached")

    def __init__(self, pool: Pool, slot: _Slot, uncached: int, blocks: Sequence[bytes]) -> None:
        self._pool = pool
        self._slot = slot
        self._uncached = uncached
        self._blocks = blocks
        self._computed = self._ended = False

    def computed(self) -> None:
        """The prompt is computed: a first token was seen."""
        if not (self._computed or self._ended):
            self._computed = True
            self._pool.arrived(self._slot, self._uncached)

    def ended(self) -> None:
        """The request is not at the worker any more."""
        if not self._ended:
            was_computed = self._computed
            self.computed()
            self._ended = True
            self._pool.left(self._slot, self._blocks, come=was_computed)


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
        self._weights = weights
        self._uses_events = uses_events
        self._now = now
        self._rng = rng
        self._slots: dict[Address, _Slot] = {}
        self._by_number: list[_Slot | None] = []
        self._index = BlockIndex()
        self._expected = Expected(_EVENT_TTL_S if uses_events else weights.ttl_s)
        self._masks: dict[frozenset[Address], tuple[Floats, int]] = {}
        self._turn = 0
        self._grow(8)

    def _grow(self, size: int) -> None:
        """Make room for more slots; the new columns are empty."""

        def wider(old: str) -> Floats:
            column: Floats = np.zeros(size)
            if hasattr(self, old):
                known = getattr(self, old)
                column[: len(known)] = known
            return column

        self._ours = wider("_ours")  # requests that we sent and that have not ended
        self._others = wider(
            "_others"
        )  # what it told beyond ours; below 0: ours that it did not know
        self._waiting = wider("_waiting")  # our prompt tokens that are not computed yet
        self._others_waiting = wider("_others_waiting")  # requests of others that wait there
        self._holding = wider("_holding")  # new blocks of our open requests
        self._available = wider("_available")  # blocks to be had, those included
        is_open: Bools = np.zeros(size, dtype=np.bool_)
        is_open[: len(self._by_number)] = getattr(self, "_open", is_open)[: len(self._by_number)]
        self._open = is_open
        self._open_bits = sum(1 << int(n) for n in np.flatnonzero(is_open))
        self._barred: Floats = np.where(is_open, 0.0, np.inf)
        self._by_number += [None] * (size - len(self._by_number))
        self._masks.clear()

    # --- workers -------------------------------------------------------------------------------

    def update(self, records: Collection[WorkerRecord]) -> None:
        """Take the full set of workers; another incarnation is another worker, which holds nothing."""
        fresh = {record.address: record for record in records}
        for address in [address for address in self._slots if address not in fresh]:
            self._remove(self._slots.pop(address))
        for address, record in fresh.items():
            slot = self._slots.get(address)
            if slot is None:
                self._slots[address] = self._add(record)
            else:
                slot.record = record

    def _add(self, record: WorkerRecord) -> _Slot:
        if None not in self._by_number:
            self._grow(2 * len(self._by_number))
        number = self._by_number.index(None)
        slot = self._by_number[number] = _Slot(number, record)
        self._available[number] = record.engine.num_blocks
        self._masks.clear()
        return slot

    def _remove(self, slot: _Slot) -> None:
        number = slot.number
        self._index.clear(number)
        self._expected.forget(number)
        for column in (
            self._ours,
            self._others,
            self._waiting,
            self._others_waiting,
            self._holding,
        ):
            column[number] = 0.0
        self._set_open(number, False)
        self._by_number[number] = None
        self._masks.clear()

    def set_open(self, address: Address, is_open: bool) -> None:
        """Note whether a worker takes new requests; one that is new does not until told."""
        slot = self._slots.get(address)
        if slot is not None and bool(self._open[slot.number]) != is_open:
            self._set_open(slot.number, is_open)

    def _set_open(self, number: int, is_open: bool) -> None:
        self._open[number] = is_open
        self._barred[number] = 0.0 if is_open else np.inf
        bit = 1 << number
        self._open_bits = self._open_bits | bit if is_open else self._open_bits & ~bit

    def told(self, address: Address, stats: EngineStats) -> None:
        """Take what a worker tells about its load."""
        slot = self._slots.get(address)
        if slot is None:
            return
        number = slot.number
        ours = self._ours[number]
        self._others[number] = stats.num_running + stats.num_waiting - ours
        self._others_waiting[number] = max(0.0, stats.num_waiting - ours)
        # Of what we hold now it knew when it told; what we take and give back from here on changes it.
        available = stats.free_blocks + stats.cached_blocks + self._holding[number]
        self._available[number] = available

    # --- what they hold ------------------------------------------------------------------------

    def has_snapshot(self, address: Address) -> bool:
        """Return whether it is known what a worker holds."""
        slot = self._slots.get(address)
        return slot is not None and slot.seq is not None

    def num_blocks(self, address: Address) -> int:
        """Return how many blocks a worker is known to hold."""
        slot = self._slots.get(address)
        return self._index.num_held(slot.number) if slot is not None else 0

    def apply(self, address: Address, events: Sequence[KvEvent]) -> bool:
        """Take KV events of a worker, in order.

        False: one is missing before these. What the worker holds is then not known, and counts for
        nothing, until a snapshot comes; the caller asks for it. Events that came before are ignored.
        """
        slot = self._slots.get(address)
        if slot is None:
            return True
        number, index, expected = slot.number, self._index, self._expected
        for event in events:
            if event.kind is KvEventKind.CLEARED:
                # Whatever was missed before it is gone as well.
                index.clear(number)
                slot.seq, slot.in_snapshot = event.seq, True
                continue
            if slot.seq is None:
                return False
            if event.seq == slot.seq + 1:
                slot.seq, slot.in_snapshot = event.seq, False
            elif event.seq > slot.seq:
                index.clear(number)
                slot.seq = None
                return False
            elif event.seq < slot.seq or not slot.in_snapshot:
                continue
            if event.kind is KvEventKind.STORED:
                index.store(number, event.block_hashes)
            else:
                index.remove(number, event.block_hashes)
            expected.settle(number, event.block_hashes)
        return True

    # --- requests ------------------------------------------------------------------------------

    def place(
        self,
        query: Query,
        *,
        allowed: Collection[Address] | None = None,
        exclude: Address | None = None,
    ) -> Choice | None:
        """Return the worker for a prompt; None when no open one is among ``allowed``."""
        barred, bits = self._barred, self._open_bits
        if allowed is not None:
            mask, mask_bits = self._mask(allowed)
            barred, bits = barred + mask, bits & mask_bits
        if exclude is not None and (slot := self._slots.get(exclude)) is not None:
            barred, bits = barred.copy(), bits & ~(1 << slot.number)
            barred[slot.number] = np.inf
        if not bits:
            return None
        self._turn += 1
        if self._mode is RouterMode.KV:
            return self._cheapest(query, barred, bits)
        return self._next(query, barred)

    def _next(self, query: Query, barred: Floats) -> Choice:
        """Return a worker without regard to what is cached."""
        requests = self._requests()
        if self._mode is RouterMode.LEAST_LOADED:
            number = policies.least(requests + barred, self._turn)
            why = f"fewest requests ({requests[number]:.0f})"
        else:
            numbers = np.flatnonzero(barred == 0.0)
            count = len(numbers)
            if self._mode is RouterMode.RANDOM:
                at, why = policies.pick_random(count, self._rng), f"drawn from {count}"
            else:
                at, why = policies.round_robin(count, self._turn), f"its turn among {count}"
            number = int(numbers[at])
        record = self._record(number)
        return Choice(
            record.address,
            record.worker_id,
            self._mode,
            0,
            len(query.prompt_token_ids),
            float(requests[number]),
            why,
        )

    def _record(self, number: int) -> WorkerRecord:
        slot = self._by_number[number]
        assert slot is not None, "an open slot has its worker"
        return slot.record

    def _requests(self) -> Floats:
        """Return the requests at workers: what they told, and what we have sent since; never below ours."""
        requests: Floats = self._ours + np.maximum(0.0, self._others)
        return requests

    def _mask(self, allowed: Collection[Address]) -> tuple[Floats, int]:
        """Return a column that bars all but some workers, and the bits of those."""
        key = allowed if isinstance(allowed, frozenset) else frozenset(allowed)
        found = self._masks.get(key)
        if found is None:
            mask: Floats = np.full(len(self._by_number), np.inf)
            numbers = [self._slots[one].number for one in key if one in self._slots]
            mask[numbers] = 0.0
            if len(self._masks) >= _MASKS_KEPT:
                self._masks.clear()
            found = self._masks[key] = (mask, sum(1 << number for number in numbers))
        return found

    def _cheapest(self, query: Query, barred: Floats, bits: int) -> Choice:
        self._expected.expire(self._now())
        # All workers of a pool serve one model; one with blocks of another size finds nothing cached.
        engine = self._record(bits.bit_length() - 1).engine
        prompt_tokens = len(query.prompt_token_ids)
        overlap = self._overlap(query, engine, bits)
        waiting = self._waiting + self._others_waiting * prompt_tokens
        loads = Loads(self._requests(), waiting, self._available - self._holding, barred)
        found = costs(loads, overlap, prompt_tokens, engine.block_size, self._weights)
        if self._weights.temperature:
            number = policies.draw(found.total, self._weights.temperature, self._rng)
        else:
            number = policies.least(found.total, self._turn)
        rows = self._rows(number, loads, found, prompt_tokens)
        record = self._record(number)
        return Choice(
            record.address,
            record.worker_id,
            self._mode,
            rows[0].overlap_tokens,
            prompt_tokens,
            rows[0].cost,
            self._why(rows[0], float(overlap.max()), found),
            rows,
        )

    def _overlap(self, query: Query, engine: EngineInfo, bits: int) -> Floats:
        """Return the tokens of the prompt that each slot holds; at least one is always computed."""
        tokens: Floats = np.zeros(len(self._by_number))
        chain = query.chain(engine.model_id, engine.block_size)
        tables = (self._index.holders, self._expected.index.holders)
        for depth, group in match(chain, tables, bits):
            held = min(depth * engine.block_size, len(query.prompt_token_ids) - 1)
            if group & (group - 1) == 0:
                tokens[group.bit_length() - 1] = held
            else:
                packed = group.to_bytes((len(tokens) + 7) // 8, "little")
                members = np.unpackbits(
                    np.frombuffer(packed, np.uint8), count=len(tokens), bitorder="little"
                )
                tokens[members.view(np.bool_)] = held
        return tokens

    def _rows(self, chosen: int, loads: Loads, found: Costs, prompt_tokens: int) -> tuple[Row, ...]:
        """Return the chosen worker and the cheapest others."""
        left = found.total.copy()
        rows: list[Row] = []
        number = chosen
        while len(rows) < _NUM_ROWS and left[number] != np.inf:
            left[number] = np.inf
            overlap = int(found.overlap_tokens[number])
            rows.append(
                Row(
                    self._record(number).worker_id,
                    overlap,
                    prompt_tokens - overlap,
                    int(loads.waiting_tokens[number]),
                    int(loads.requests[number]),
                    int(loads.available_blocks[number]),
                    float(found.total[number]),
                    found.capped is not None and bool(found.capped[number]),
                )
            )
            number = int(left.argmin())
        return tuple(rows)

    def _why(self, chosen: Row, most: float, found: Costs) -> str:
        why = "drawn by cost" if self._weights.temperature else "lowest cost"
        if most <= chosen.overlap_tokens:
            return why
        reason = "over the affinity cap" if found.capped is not None else "with too much to do"
        return f"{why}; {most:.0f} tokens are cached at a worker {reason}"

    def charge(self, choice: Choice, query: Query) -> Charge:
        """Take notice that the request was sent to the worker of ``choice``."""
        slot = self._slots.get(choice.address)
        if slot is None:  # it left in between: nothing to keep books of
            return _NoCharge()
        number, uncached = slot.number, choice.prompt_tokens - choice.overlap_tokens
        self._ours[number] += 1
        self._waiting[number] += uncached
        blocks: Sequence[bytes] = ()
        if self._mode is RouterMode.KV:
            engine = slot.record.engine
            chain = query.chain(engine.model_id, engine.block_size)
            held = self._index
            blocks = [one for one in chain.all() if not held.holds(number, one)]
            self._holding[number] += len(blocks)
            self._expected.expect(number, blocks, self._now(), max(1, engine.num_blocks))
        return Charge(self, slot, uncached, blocks)

    def arrived(self, slot: _Slot, uncached: int) -> None:
        """Take notice that a prompt is computed."""
        if self._by_number[slot.number] is slot:
            waiting = self._waiting[slot.number] - uncached
            self._waiting[slot.number] = max(0.0, waiting)

    def left(self, slot: _Slot, blocks: Sequence[bytes], *, come: bool) -> None:
        """Take notice that a request has ended; its new blocks have come into the cache, or never will."""
        number = slot.number
        if self._by_number[number] is slot:
            self._ours[number] = max(0.0, self._ours[number] - 1)
            self._holding[number] = max(0.0, self._holding[number] - len(blocks))
            if not come:
                self._expected.settle(number, blocks)


class _NoCharge(Charge):
    """A request at a worker that nobody keeps books of any more."""

    def __init__(self) -> None:
        self._computed = self._ended = True

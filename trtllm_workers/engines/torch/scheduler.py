"""Decides what one step computes. Pure bookkeeping: knows no tensor, thread or clock.

Each step, under ``max_num_tokens``:

1. every sequence that decodes gets its token, oldest first; when the pool is full the youngest
   running sequence is preempted: its blocks go back, it waits and is computed again;
2. running prefills go on, oldest first, in pieces;
3. waiting sequences are admitted in order of arrival, if the blocks of all their tokens are there.

While anything decodes, prefills advance by at most ``mixed_prefill_tokens`` a step, so that a long
prompt does not hold up running streams.

A waiting sequence whose next missing block is just being computed by an older running one stays
back for it and then shares it (n answers to one prompt cost one prefill). That cannot deadlock: it
waits only for running, older sequences, the oldest running prefill advances in every step, and a
preempted or aborted one is no longer waited for.

Handoffs stand beside running. A prefilled sequence is *pinned*: it keeps its blocks until released.
A sequence that only wants blocks waits its turn like all others and is *reserved* then: it will run,
so it counts towards ``max_running``. Neither is computed, preempted or waited for as one that fills
blocks; when nothing else can run, only an order from outside changes that. A preempted sequence that cannot
be computed again has its KV saved, and restored when it is admitted::

    waiting ──▶ running ──▶ ended            running ──pin──▶ pinned ──▶ ended
        └─────▶ reserved ──resume, prefill_reserved──▶ running
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from trtllm_workers.engines.torch.pool import BlockPool
from trtllm_workers.engines.torch.sequence import Purpose, Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one step and of the batch."""

    block_size: int
    max_running: int
    max_num_tokens: int
    mixed_prefill_tokens: int
    chunked_prefill: bool = True


@dataclass(slots=True)
class Step:
    """What to compute: (sequence, number of tokens) from its ``num_computed`` on.

    ``reserved`` got their blocks now; there is nothing to compute for them. Before anything else is done,
    the KV of ``saved`` (sequence, blocks) is to be copied into their ``saved``, then that of ``restored``
    from there: into the blocks of the sequence from the given one on.
    """

    decodes: list[Sequence] = field(default_factory=list)
    prefills: list[tuple[Sequence, int]] = field(default_factory=list)
    reserved: list[Sequence] = field(default_factory=list)
    saved: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    restored: list[tuple[Sequence, int, list[int]]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """Owns the sequences and their blocks: waiting, running, pinned, reserved."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.pinned: list[Sequence] = []
        self.reserved: list[Sequence] = []
        self.num_preemptions = 0
        self.cached_prompt_tokens = 0
        self.prompt_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the line."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and let go of its blocks."""
        for place in (self.running, self.waiting, self.pinned, self.reserved):
            if sequence in place:
                place.remove(sequence)
                break
        self._release(sequence)

    def pin(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch; it keeps its blocks until removed."""
        self.running.remove(sequence)
        self.pinned.append(sequence)

    def resume(self, sequence: Sequence, *, filled: bool) -> None:
        """Run a reserved sequence; with ``filled`` the KV of its whole prompt is in its blocks.

        Only now are blocks that came from elsewhere shared: before, their KV was not there.
        """
        self.reserved.remove(sequence)
        sequence.purpose = Purpose.GENERATE
        if filled:
            self._advance(sequence, sequence.num_prompt - sequence.num_computed)
        bisect.insort(self.running, sequence, key=lambda running: running.arrival)

    def prefill_reserved(self, sequence: Sequence, num_filled: int) -> None:
        """Run a reserved sequence up to its first token; its first ``num_filled`` blocks hold their KV."""
        self.reserved.remove(sequence)
        sequence.purpose = Purpose.PREFILL
        brought = num_filled * self.limits.block_size - sequence.num_computed
        if brought > 0:
            self._advance(sequence, brought)
            sequence.cached_tokens = sequence.num_computed
            self.cached_prompt_tokens += brought
        bisect.insort(self.running, sequence, key=lambda running: running.arrival)

    def plan(self) -> Step:
        """Return the next step, having taken the blocks it writes to.

        Empty when nothing is left, or all that waits lacks what pinned and reserved ones hold.
        """
        step = Step()
        for sequence in [s for s in self.running if s.num_remaining == 1]:
            preempted = not sequence.blocks  # by an older one, a moment ago
            if not preempted and self._make_room(sequence, step):
                step.decodes.append(sequence)
        budget = self.limits.max_num_tokens - len(step.decodes)
        if step.decodes and self.limits.chunked_prefill:
            budget = min(budget, self.limits.mixed_prefill_tokens)
        for sequence in self.running:
            if budget and sequence.num_remaining > 1:
                count = min(sequence.num_remaining, budget)
                step.prefills.append((sequence, count))
                budget -= count
        self._admit(step, budget)
        return step

    def commit(self, step: Step) -> None:
        """Count the step as computed and share the blocks it filled."""
        for sequence in step.decodes:
            self._advance(sequence, 1)
        for sequence, count in step.prefills:
            self._advance(sequence, count)

    # --- blocks --------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, step: Step) -> bool:
        """Give a decoding sequence the block of its next token; False when it was preempted."""
        if len(sequence.tokens) <= len(sequence.blocks) * self.limits.block_size:
            return True
        while not self.pool.num_available:
            victim = self.running[-1]
            self._preempt(victim, step)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self.running.remove(sequence)
        if not sequence.can_recompute:
            sequence.num_saved = sequence.num_computed
            count = -(-sequence.num_saved // self.limits.block_size)
            step.saved.append((sequence, sequence.blocks[:count]))
        self._release(sequence)
        bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.arrival)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_stored = 0

    def _advance(self, sequence: Sequence, count: int) -> None:
        sequence.num_computed += count
        num_full = sequence.num_computed // self.limits.block_size
        if not self.pool.reuse or num_full == sequence.num_stored:
            return
        sequence.extend_hashes(self.limits.block_size)
        full = sequence.blocks[:num_full]
        self.pool.store(full, sequence.hashes, sequence.num_stored)
        sequence.blocks[:num_full] = full
        sequence.num_stored = num_full

    # --- admission -----------------------------------------------------------------------------

    def _admit(self, step: Step, budget: int) -> None:
        under_way: dict[bytes, int] | None = None
        for sequence in list(self.waiting):
            if len(self.running) + len(self.reserved) >= self.limits.max_running:
                return
            only_blocks = sequence.purpose is Purpose.RESERVE
            if budget <= 0 and not only_blocks:
                return
            if under_way is None:
                under_way = self._under_way()
            cached = self._match(sequence)
            if self._computed_by_older(sequence, len(cached), under_way):
                continue
            num_cached = max(len(cached) * self.limits.block_size, sequence.num_saved)
            remaining = len(sequence.tokens) - num_cached
            if not self._fits(sequence, cached, remaining, budget):
                return  # first come, first served: nobody behind overtakes
            self._start(sequence, cached, step)
            if only_blocks:
                self.reserved.append(sequence)
                step.reserved.append(sequence)
                continue
            bisect.insort(self.running, sequence, key=lambda running: running.arrival)
            count = min(remaining, budget)
            step.prefills.append((sequence, count))
            budget -= count
            self._note_under_way(sequence, under_way)

    def _match(self, sequence: Sequence) -> list[int]:
        if not self.pool.reuse:
            return []
        # The last token is always computed: its logits are what is asked for.
        limit = (len(sequence.tokens) - 1) // self.limits.block_size
        return self.pool.match(sequence.hashes[:limit])

    def _fits(self, sequence: Sequence, cached: list[int], remaining: int, budget: int) -> bool:
        computed = sequence.purpose is not Purpose.RESERVE
        whole = not self.limits.chunked_prefill and not sequence.num_output
        if computed and whole and remaining > budget:
            # It will get a step that takes it whole: nobody overtakes it, so those before it end.
            return False
        needed = -(-len(sequence.tokens) // self.limits.block_size) - len(cached)
        room = self.pool.num_available - self.pool.num_cached_of(cached)
        # One block beside for each sequence that will grow, or what is admitted now is preempted soon.
        growing = sum(other.purpose is not Purpose.PREFILL for other in self.running)
        return needed + growing + len(self.reserved) <= room

    def _start(self, sequence: Sequence, cached: list[int], step: Step) -> None:
        self.pool.hold(cached)
        needed = -(-len(sequence.tokens) // self.limits.block_size) - len(cached)
        sequence.blocks = cached + self.pool.allocate(needed)
        sequence.num_stored = len(cached)
        sequence.num_computed = len(cached) * self.limits.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            self.prompt_tokens += sequence.num_prompt
            self.cached_prompt_tokens += sequence.num_computed
        if sequence.num_saved:
            end = -(-sequence.num_saved // self.limits.block_size)
            self._advance(sequence, max(0, sequence.num_saved - sequence.num_computed))
            step.restored.append((sequence, len(cached), sequence.blocks[len(cached) : end]))
            sequence.num_saved = 0
        self.waiting.remove(sequence)

    def _under_way(self) -> dict[bytes, int]:
        """Return the hashes of blocks that running sequences are about to fill, by arrival."""
        under_way: dict[bytes, int] = {}
        if self.pool.reuse:
            for sequence in self.running:
                self._note_under_way(sequence, under_way)
        return under_way

    def _note_under_way(self, sequence: Sequence, under_way: dict[bytes, int]) -> None:
        if self.pool.reuse and sequence.num_remaining > 1:
            for digest in sequence.hashes[sequence.num_stored :]:
                under_way.setdefault(digest, sequence.arrival)

    def _computed_by_older(
        self, sequence: Sequence, num_cached: int, under_way: dict[bytes, int]
    ) -> bool:
        limit = (len(sequence.tokens) - 1) // self.limits.block_size
        if num_cached >= min(limit, len(sequence.hashes)):
            return False
        owner = under_way.get(sequence.hashes[num_cached])
        return owner is not None and owner < sequence.arrival

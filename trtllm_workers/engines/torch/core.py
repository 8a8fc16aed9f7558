"""The engine without its thread: requests in, one step at a time, results out. Knows no event loop.

A step is: ``plan`` (scheduler), ``compute`` (model, sampling), ``finish`` (blocks, results). What is
chosen in ``compute`` goes into ``finish`` by hand, so that ranks that sample nothing can follow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from trtllm_workers.blocks import root_hash
from trtllm_workers.engines.torch.batches import batch_of
from trtllm_workers.engines.torch.loading import Loaded
from trtllm_workers.engines.torch.pool import BlockPool
from trtllm_workers.engines.torch.sampling import Sampled, sample
from trtllm_workers.engines.torch.scheduler import Limits, Scheduler, Step
from trtllm_workers.engines.torch.sequence import Purpose, Rows, Sequence
from trtllm_workers.errors import EngineError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.types import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    Prefilled,
    Reservation,
    TokenChunk,
)

log = get_logger(__name__)

# While anything decodes, a CPU step takes at most so many prompt tokens: enough for the matrix
# kernels to be efficient, short enough that streams do not visibly stall.
MIXED_PREFILL_TOKENS_CPU = 256

Key = TypeVar("Key")

# What a step has for one request. The end of a request comes as a TokenChunk, whatever it was for.
Result = TokenChunk | Prefilled | Reservation


@dataclass(slots=True)
class _Times:
    """When a request came and when its first token was begun, in seconds of ``time.monotonic``."""

    arrived_s: float
    started_s: float | None = None


class Core(Generic[Key]):
    """Serves requests known by a key of the caller's: any hashable object, unique while it runs."""

    def __init__(self, loaded: Loaded, *, chunked_prefill: bool, reuse: bool) -> None:
        info = loaded.info
        self.loaded = loaded
        self.pool = BlockPool(info.num_blocks, reuse=reuse)
        self.scheduler = Scheduler(
            Limits(
                block_size=info.block_size,
                # Each running sequence needs at least one token of a step.
                max_running=min(info.max_batch_size, info.max_num_tokens),
                max_num_tokens=info.max_num_tokens,
                mixed_prefill_tokens=(
                    MIXED_PREFILL_TOKENS_CPU if info.device == "cpu" else info.max_num_tokens
                ),
                chunked_prefill=chunked_prefill,
            ),
            self.pool,
        )
        self._eos = tuple(token for token in info.eos_token_ids if token < info.vocab_size)
        self._sequences: dict[Key, Sequence] = {}
        self._keys: dict[int, Key] = {}  # by arrival
        self._times: dict[int, _Times] = {}  # by arrival; of prefills only
        self._step = Step()
        self._computed: list[Sequence] = []  # of the step at hand, those that get a token
        self._is_stuck = False
        self._held_by: tuple[int, int] | None = None
        self._num_arrived = 0
        self._num_steps = 0
        self._output_tokens = 0
        self._num_aborts = 0
        self._num_finished = 0

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do, until another order comes."""
        return self._is_stuck or not (self.scheduler.running or self.scheduler.waiting)

    @property
    def has_step(self) -> bool:
        """Whether ``plan`` left something to compute."""
        return bool(self._step)

    def add(
        self,
        key: Key,
        request: GenerateRequest,
        purpose: Purpose = Purpose.GENERATE,
        arrived_s: float | None = None,
        rows: Rows = (),
    ) -> None:
        """Queue an accepted request; unless it is only to be reserved, with the rows of its images."""
        info = self.loaded.info
        root = root_hash(info.model_id, request.cache_salt)
        sequence = Sequence(request, self._num_arrived, root, info.block_size, purpose, rows)
        self._num_arrived += 1
        self._sequences[key] = sequence
        self._keys[sequence.arrival] = key
        if purpose is Purpose.PREFILL:
            now_s = time.monotonic() if arrived_s is None else arrived_s
            self._times[sequence.arrival] = _Times(now_s)
        self.scheduler.add(sequence)
        self._is_stuck = False

    def abort(self, key: Key) -> TokenChunk | None:
        """End a request in any phase and free its blocks; None when it is not here (any more)."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return None
        self._forget(sequence)
        self._num_aborts += 1
        return TokenChunk(
            (), finish_reason=FinishReason.ABORT, cached_tokens=sequence.cached_tokens or 0
        )

    def abort_all(self) -> list[tuple[Key, TokenChunk]]:
        """End every request."""
        ended = [(key, self.abort(key)) for key in list(self._sequences)]
        return [(key, chunk) for key, chunk in ended if chunk is not None]

    def release(self, key: Key) -> None:
        """Let go of a pinned request's blocks; of any other request does nothing."""
        sequence = self._sequences.get(key)
        if sequence is not None and sequence in self.scheduler.pinned:
            self._finish(sequence)

    def resume(self, key: Key, first: TokenChunk | None, rows: Rows = ()) -> None:
        """Go on with a reserved request: after the tokens of ``first``, or by computing its prompt.

        ``first`` has at least one token and fewer than ``max_tokens``, or a finish_reason. Of a
        request that is not reserved (any more) does nothing.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence not in self.scheduler.reserved:
            return
        self._is_stuck = False
        self._held_by = None
        if first is not None and first.finish_reason is not None:
            self._finish(sequence)  # nothing was pinned for it, so nothing was brought
            return
        sequence.rows = rows
        self.scheduler.resume(sequence, filled=first is not None)
        if first is not None:
            sequence.cached_tokens = first.cached_tokens
            for token in first.token_ids:
                sequence.append(token)

    def prefill_reserved(
        self, key: Key, num_filled_blocks: int, asked_s: float, rows: Rows = ()
    ) -> None:
        """Compute a reserved request's prompt after its first blocks, whose KV is there, and pin it.

        Of a request that is not reserved (any more) does nothing.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence not in self.scheduler.reserved:
            return
        self._is_stuck = False
        self._held_by = None
        self._times[sequence.arrival] = _Times(asked_s)
        sequence.rows = rows
        self.scheduler.prefill_reserved(sequence, num_filled_blocks)

    def holdings(self) -> dict[str, int]:
        """Return how many blocks each request holds, by request id."""
        return {
            sequence.request.request_id: len(sequence.blocks)
            for sequence in self._sequences.values()
            if sequence.blocks
        }

    def step(self) -> list[tuple[Key, Result]]:
        """Plan, compute and finish one step; return what it has for whom."""
        results = self.plan()
        return results + self.finish(self.compute()) if self._step else results

    def plan(self) -> list[tuple[Key, Result]]:
        """Decide the next step and return the reservations made."""
        scheduler = self.scheduler
        step = self._step = scheduler.plan()
        self._save_and_restore(step)
        if step.reserved:
            self._held_by = None
        elif not step:
            if not (scheduler.pinned or scheduler.reserved):
                raise RuntimeError(
                    f"nothing can run, though {len(scheduler.waiting)} requests wait for "
                    f"{self.pool.num_available} of {self.pool.num_blocks} blocks"
                )
            self._is_stuck = True  # until somebody releases, resumes or aborts
        return [(self._keys[s.arrival], self._reservation(s)) for s in step.reserved]

    def compute(self) -> list[Sampled]:
        """Run the model on the planned step and choose its tokens."""
        return self._sample(self.forward(), self._computed)

    def forward(self) -> torch.Tensor:
        """Run the model on the planned step; on ranks above 0 nothing is to be done with the result."""
        if self._times:
            now_s = time.monotonic()
            for sequence, _count in self._step.prefills:
                times = self._times.get(sequence.arrival)
                if times is not None and times.started_s is None:
                    times.started_s = now_s
        batch, self._computed = batch_of(self._step, self.loaded.media_rows)
        return self.loaded.model.forward(batch, self.loaded.memory)

    def finish(self, chosen: Seq[Sampled]) -> list[tuple[Key, Result]]:
        """Take the step as computed and ``chosen`` as its tokens; return what it has for whom."""
        step, self._step = self._step, Step()
        self.scheduler.commit(step)
        self._num_steps += 1
        return [
            (self._keys[sequence.arrival], self._result(sequence, found))
            for sequence, found in zip(self._computed, chosen, strict=True)
        ]

    def state(self) -> tuple[int, ...]:
        """Return numbers that are equal where the same orders and tokens came in the same order."""
        scheduler = self.scheduler
        places = (scheduler.waiting, scheduler.running, scheduler.pinned, scheduler.reserved)
        return (self._num_steps, self.pool.num_free, self.pool.num_cached, *map(len, places))

    def stats(self) -> EngineStats:
        """Return load and counters now."""
        scheduler, pool = self.scheduler, self.pool
        if self._held_by is None:
            self._held_by = (_num_distinct(scheduler.pinned), _num_distinct(scheduler.reserved))
        return EngineStats(
            num_running=len(scheduler.running) + len(scheduler.reserved),
            num_waiting=len(scheduler.waiting),
            total_blocks=pool.num_blocks,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            active_blocks=pool.num_active,
            num_steps=self._num_steps,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            output_tokens=self._output_tokens,
            preemptions=scheduler.num_preemptions,
            aborts=self._num_aborts,
            finished=self._num_finished,
            pinned_blocks=self._held_by[0],
            reserved_blocks=self._held_by[1],
            allocated_blocks=pool.num_allocated,
            freed_blocks=pool.num_freed,
        )

    # -------------------------------------------------------------------------------------------

    def _save_and_restore(self, step: Step) -> None:
        memory = self.loaded.memory
        for sequence, blocks in step.saved:
            sequence.saved = [bytes(memory.export_block(block)) for block in blocks]
        for sequence, first, blocks in step.restored:
            for at, block in enumerate(blocks, start=first):
                memory.import_block(block, sequence.saved[at])
            sequence.saved = []

    def _sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled]:
        if not sequences:
            return []
        try:
            return sample(logits, sequences, self._eos)
        except Exception:  # one request's parameters must not end the others
            log.warning("sampling a batch failed; sampling row by row", exc_info=True)
        chosen = []
        for row, sequence in enumerate(sequences):
            try:
                chosen += sample(logits[row : row + 1], [sequence], self._eos)
            except Exception as error:  # noqa: BLE001 - as above
                chosen.append(Sampled(error=f"sampling failed: {error!r}"))
        return chosen

    def _reservation(self, sequence: Sequence) -> Reservation:
        return Reservation(block_ids=tuple(sequence.blocks), num_cached_blocks=sequence.num_stored)

    def _result(self, sequence: Sequence, found: Sampled) -> Result:
        """Return a sequence's token, and pin the sequence if that is what it was computed for."""
        times = self._times.get(sequence.arrival)
        chunk = self._tell(sequence, found)
        if times is None:
            return chunk
        started_s = times.arrived_s if times.started_s is None else times.started_s
        queue_s, compute_s = started_s - times.arrived_s, time.monotonic() - started_s
        if chunk.finish_reason is not None:
            return Prefilled(first=chunk, queue_s=queue_s, compute_s=compute_s)
        self.scheduler.pin(sequence)
        self._held_by = None
        return Prefilled(
            first=chunk,
            block_ids=tuple(sequence.blocks),
            num_tokens=sequence.num_prompt,
            queue_s=queue_s,
            compute_s=compute_s,
        )

    def _tell(self, sequence: Sequence, found: Sampled) -> TokenChunk:
        """Add a sampled token to its sequence, end it if need be, and return the chunk."""
        cached_tokens = sequence.cached_tokens or 0
        if found.error is not None:
            self._finish(sequence)
            log.error("request failed", request_id=sequence.request.request_id, error=found.error)
            return TokenChunk(
                (),
                finish_reason=FinishReason.ERROR,
                cached_tokens=cached_tokens,
                error_code=EngineError.code,
                error_message=f"request {sequence.request.request_id}: {found.error}",
            )
        sampling = sequence.request.sampling
        token = found.token
        sequence.append(token)
        self._output_tokens += 1
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            self._finish(sequence)
            return TokenChunk(
                (),
                finish_reason=FinishReason.STOP,
                cached_tokens=cached_tokens,
                num_hidden_tokens=1,
                logprobs=None if sampling.logprobs is None else (),
                stop_token_id=token,
            )
        reason = None
        if sequence.num_output >= sampling.max_tokens:
            reason = FinishReason.LENGTH
            self._finish(sequence)
        return TokenChunk(
            (token,),
            finish_reason=reason,
            cached_tokens=cached_tokens,
            logprobs=None if found.logprob is None else (found.logprob,),
        )

    def _finish(self, sequence: Sequence) -> None:
        self._num_finished += 1
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        key = self._keys.pop(sequence.arrival)
        del self._sequences[key]
        self._times.pop(sequence.arrival, None)
        self._is_stuck = False
        self._held_by = None


def _num_distinct(sequences: Seq[Sequence]) -> int:
    """Return how many blocks these hold; one that several share counts once."""
    return len({block for sequence in sequences for block in sequence.blocks})

"""The engine without its thread: requests in, one step at a time, chunks out. Knows no event loop.

A step is: plan (scheduler), compute (model), choose (sampling), commit (blocks), tell (chunks).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Generic, TypeVar

import torch

from trtllm_workers.blocks import root_hash
from trtllm_workers.engines.torch.attention import Span
from trtllm_workers.engines.torch.loading import Loaded
from trtllm_workers.engines.torch.model import Batch
from trtllm_workers.engines.torch.pool import BlockPool
from trtllm_workers.engines.torch.sampling import Sampled, sample
from trtllm_workers.engines.torch.scheduler import Limits, Scheduler, Step
from trtllm_workers.engines.torch.sequence import Sequence
from trtllm_workers.errors import EngineError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.types import EngineStats, FinishReason, GenerateRequest, TokenChunk

log = get_logger(__name__)

# While anything decodes, a CPU step takes at most so many prompt tokens: enough for the matrix
# kernels to be efficient, short enough that streams do not visibly stall.
MIXED_PREFILL_TOKENS_CPU = 256

Key = TypeVar("Key")


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
        self._num_arrived = 0
        self._num_steps = 0
        self._output_tokens = 0
        self._num_aborts = 0
        self._num_finished = 0

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not self._sequences

    def add(self, key: Key, request: GenerateRequest) -> None:
        """Queue an accepted request."""
        info = self.loaded.info
        root = root_hash(info.model_id, request.cache_salt)
        sequence = Sequence(request, self._num_arrived, root, info.block_size)
        self._num_arrived += 1
        self._sequences[key] = sequence
        self._keys[sequence.arrival] = key
        self.scheduler.add(sequence)

    def abort(self, key: Key) -> TokenChunk | None:
        """End a request and free its blocks; None when it is not here (any more)."""
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

    def step(self) -> list[tuple[Key, TokenChunk]]:
        """Compute one step and return what it adds to which stream."""
        step = self.scheduler.plan()
        if not step:
            raise RuntimeError(
                f"nothing can run, though {len(self.scheduler.waiting)} requests wait for "
                f"{self.pool.num_available} of {self.pool.num_blocks} blocks"
            )
        batch, sampling = _batch_of(step)
        logits = self.loaded.model.forward(batch, self.loaded.memory)
        chosen = self._sample(logits, sampling)
        self.scheduler.commit(step)
        self._num_steps += 1
        return [
            (self._keys[sequence.arrival], self._tell(sequence, found))
            for sequence, found in zip(sampling, chosen, strict=True)
        ]

    def stats(self) -> EngineStats:
        """Return load and counters now."""
        scheduler, pool = self.scheduler, self.pool
        return EngineStats(
            num_running=len(scheduler.running),
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
        )

    # -------------------------------------------------------------------------------------------

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


def _batch_of(step: Step) -> tuple[Batch, list[Sequence]]:
    """Return a step's rows, and the sequences whose last row ends their tokens."""
    batch = Batch([], [], [], [])
    sampling: list[Sequence] = []
    # Longest first: attention then finds sequences of like length in neighbouring rows.
    decodes = sorted(step.decodes, key=lambda sequence: -sequence.num_computed)
    for sequence, count in [*((s, 1) for s in decodes), *step.prefills]:
        first = sequence.num_computed
        end = first + count
        batch.spans.append(Span(len(batch.positions), first, count, sequence.blocks))
        batch.token_ids.extend(sequence.tokens[first:end])
        batch.positions.extend(range(first, end))
        if end == len(sequence.tokens):
            batch.last_rows.append(len(batch.positions) - 1)
            sampling.append(sequence)
    return batch, sampling

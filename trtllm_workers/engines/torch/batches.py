"""From a planned step to the rows that the model computes. Decides nothing."""

from __future__ import annotations

import torch

from trtllm_workers.engines.torch.attention import Span
from trtllm_workers.engines.torch.model import Batch, InSpace
from trtllm_workers.engines.torch.scheduler import Step
from trtllm_workers.engines.torch.sequence import Sequence
from trtllm_workers.engines.torch.vision.mrope import Positions


def batch_of(step: Step, media_rows: torch.Tensor | None) -> tuple[Batch, list[Sequence]]:
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
        if media_rows is not None and first < sequence.num_prompt:
            _give_rows(batch, sequence, first, end, media_rows)
        if sequence.positions is None:
            batch.positions.extend(range(first, end))
        else:
            _place_in_space(batch, sequence.positions, first, end)
        if end == len(sequence.tokens):
            batch.last_rows.append(len(batch.positions) - 1)
            sampling.append(sequence)
    return batch, sampling


def _give_rows(
    batch: Batch, sequence: Sequence, first: int, end: int, media_rows: torch.Tensor
) -> None:
    """Have those rows of tokens [first, end) that stand for images be what the images became."""
    row = len(batch.positions) - first  # of token 0
    for token, source, count in sequence.rows:
        begin, until = max(token, first), min(token + count, end)
        if begin < until:
            at = source + begin - token
            batch.given.append((row + begin, media_rows[at : at + until - begin]))


def _place_in_space(batch: Batch, positions: Positions, first: int, end: int) -> None:
    """Add the positions of tokens [first, end)."""
    row = len(batch.positions) - first
    batch.positions.extend(positions.along_time(first, end))
    for begin, axes in positions.in_images(first, end):
        batch.in_space.append(InSpace(row + begin, axes))

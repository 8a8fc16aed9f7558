"""Logits to tokens. Knows sequences' parameters and counts; changes none of them.

A row's token depends on its own logits, its seed and its position alone: random numbers come from a
hash of (seed, position), never from a generator the batch shares, and every operation works row by
row. A batch that is greedy throughout and wants nothing else takes one argmax.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from trtllm_workers.engines.torch.sequence import Sequence
from trtllm_workers.types import SamplingParams, TokenLogprob

# Sorting a whole vocabulary costs milliseconds a row. This many of the best nearly always hold
# top_p; a row where they do not is sorted whole. Fixed, so that no row depends on its mates.
_CANDIDATES = 1024
_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sampled:
    """A row's token, or what was wrong with its logits."""

    token: int = -1
    logprob: TokenLogprob | None = None
    error: str | None = None


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on its arguments alone."""
    key = struct.pack("<QQ", seed & _SEED_MASK, position)
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def is_plain(sampling: SamplingParams, num_output: int) -> bool:
    """Return whether a row is greedy on untouched logits and wants no logprobs."""
    return (
        sampling.temperature == 0
        and sampling.logprobs is None
        and not sampling.logit_bias
        and num_output >= sampling.min_tokens
        and sampling.repetition_penalty == 1.0
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
    )


@torch.inference_mode()
def sample(
    logits: torch.Tensor, sequences: Seq[Sequence], eos_token_ids: Seq[int]
) -> list[Sampled]:
    """Choose one token per row of ``logits`` [len(sequences), vocab]."""
    scores = logits.float().cpu()
    if all(is_plain(sequence.request.sampling, sequence.num_output) for sequence in sequences):
        return _greedy(scores)
    raw = scores
    scores = scores.clone()
    for row, sequence in enumerate(sequences):
        _adjust(scores[row], sequence, eos_token_ids)
    chosen = _greedy(scores)
    drawn = [
        row
        for row, sequence in enumerate(sequences)
        if sequence.request.sampling.temperature > 0 and chosen[row].error is None
    ]
    if drawn:
        tokens = _draw(scores[drawn], [sequences[row] for row in drawn])
        for row, token in zip(drawn, tokens, strict=True):
            chosen[row] = Sampled(token)
    return [
        _with_logprobs(raw[row], found, sequence.request.sampling.logprobs)
        for row, (found, sequence) in enumerate(zip(chosen, sequences, strict=True))
    ]


def _greedy(scores: torch.Tensor) -> list[Sampled]:
    # numpy's argmax is vectorised, torch's is ten times slower; both take the first of equals.
    rows = scores.numpy()
    tokens = rows.argmax(-1)
    best = rows[np.arange(len(rows)), tokens]
    finite = np.isfinite(best)
    if finite.all():
        return [Sampled(token) for token in tokens.tolist()]
    return [
        Sampled(token)
        if good
        else Sampled(error=f"no token can be chosen: the highest logit is {value}")
        for token, value, good in zip(tokens.tolist(), best.tolist(), finite.tolist(), strict=True)
    ]


def _adjust(scores: torch.Tensor, sequence: Sequence, eos_token_ids: Seq[int]) -> None:
    """Apply penalties, bias and min_tokens to one row, in place."""
    sampling = sequence.request.sampling
    counts = sequence.output_counts
    if sampling.repetition_penalty != 1.0 and counts is not None:
        seen = torch.tensor(list({*sequence.prompt_ids, *counts}))
        found = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(found > 0, found / penalty, found * penalty)
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        output = torch.tensor(list(counts))
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        scores[output] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    if sequence.num_output < sampling.min_tokens:
        banned = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)]
        scores[banned] = -torch.inf


def _draw(scores: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Draw one token per row by temperature, top_k, top_p and min_p."""
    params = [sequence.request.sampling for sequence in sequences]
    # Subnormal temperatures would overflow; below this the best token has all the probability.
    temperatures = torch.tensor([max(p.temperature, 1e-6) for p in params]).unsqueeze(1)
    best = scores.amax(-1, keepdim=True)
    probabilities = torch.softmax((scores - best) / temperatures, -1)
    points = [uniform(s.seed, s.num_output) for s in sequences]
    tokens = [-1] * len(sequences)
    cut = [row for row, p in enumerate(params) if p.top_p < 1 or p.top_k > 0]
    whole = [row for row, p in enumerate(params) if not (p.top_p < 1 or p.top_k > 0)]
    if whole:
        found = _pick(probabilities[whole], [params[r] for r in whole], [points[r] for r in whole])
        for row, token in zip(whole, found, strict=True):
            tokens[row] = token
    if cut:
        found = _draw_sorted(probabilities[cut], [params[r] for r in cut], [points[r] for r in cut])
        for row, token in zip(cut, found, strict=True):
            tokens[row] = token
    return tokens


def _draw_sorted(
    probabilities: torch.Tensor, params: Seq[SamplingParams], points: Seq[float]
) -> list[int]:
    vocab = probabilities.shape[1]
    values, ids = probabilities.topk(min(_CANDIDATES, vocab), dim=-1)
    held = values.double().cumsum(-1)[:, -1].tolist()
    tokens = [-1] * len(params)
    few = [row for row, p in enumerate(params) if _fits_candidates(p, held[row], vocab)]
    for row in set(range(len(params))).difference(few):
        all_values, all_ids = probabilities[row].sort(descending=True, stable=True)
        picked = _pick(_cut(all_values.unsqueeze(0), [params[row]]), [params[row]], [points[row]])
        tokens[row] = int(all_ids[picked[0]])
    if few:
        chosen = [params[row] for row in few]
        columns = _pick(_cut(values[few], chosen), chosen, [points[row] for row in few])
        for row, column in zip(few, columns, strict=True):
            tokens[row] = int(ids[row, column])
    return tokens


def _fits_candidates(params: SamplingParams, held: float, vocab: int) -> bool:
    """Return whether the tokens that top_k and top_p leave are all among the candidates."""
    if vocab <= _CANDIDATES or 0 < params.top_k <= _CANDIDATES:
        return True
    return not params.top_k and held > params.top_p


def _cut(values: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """Zero what top_k and, of the rest, top_p leave out; ``values`` are sorted, best first."""
    width = values.shape[1]
    limits = torch.tensor([p.top_k if p.top_k > 0 else width for p in params]).unsqueeze(1)
    kept = torch.where(torch.arange(width) < limits, values, 0.0)
    sums = kept.double().cumsum(-1)
    # In shares of what top_k left. Where top_p is off nothing is cut: candidates hold it all.
    total = torch.where(limits < width, sums[:, -1:], 1.0)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64).unsqueeze(1)
    before = sums - kept
    # The token that reaches top_p stays; so does the best, however small top_p is.
    gone = (before >= top_p * total) & (top_p < 1)
    gone[:, 0] = False
    return kept.masked_fill(gone, 0.0)


def _pick(
    probabilities: torch.Tensor, params: Seq[SamplingParams], points: Seq[float]
) -> list[int]:
    """Return, per row, the column where the running sum passes ``points`` of the whole."""
    if any(p.min_p for p in params):
        floors = torch.tensor([p.min_p for p in params]).unsqueeze(1)
        best = probabilities.amax(-1, keepdim=True)
        probabilities = torch.where(probabilities >= floors * best, probabilities, 0.0)
    sums = probabilities.double().cumsum(-1)
    targets = torch.tensor(points, dtype=torch.float64).unsqueeze(1) * sums[:, -1:]
    columns = torch.searchsorted(sums, targets, right=True)
    # Rounding may put the target on the total; the last column that added anything is meant then.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(columns, last).squeeze(1).tolist()


def _with_logprobs(raw: torch.Tensor, found: Sampled, num_top: int | None) -> Sampled:
    if num_top is None or found.error is not None:
        return found
    logprobs = torch.log_softmax(raw.double(), -1)
    top: list[tuple[int, float]] = []
    if num_top:
        values, ids = logprobs.topk(min(num_top, logprobs.shape[0]))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(found.token, TokenLogprob(found.token, float(logprobs[found.token]), top))

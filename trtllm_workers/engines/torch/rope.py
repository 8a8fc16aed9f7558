"""Rotary position embedding as one complex multiplication. Knows positions, no tokens.

Hugging Face rotates dimension i with i + head_dim/2. Weights are reordered at load so that the two
stand next to each other; a pair is then one complex number and rotating is one product. K is cached
in that order, which only matters to those who exchange blocks: equal engines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trtllm_workers.engines.torch.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return radians per position of each pair: [head_dim / 2], float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    # "dynamic" changes the base beyond original_max_positions only, where this engine does not go.
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Slow down low frequencies by ``factor``, keep high ones, blend between."""
    wavelengths = 2 * math.pi / frequencies
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    slowed = frequencies / rope.factor
    share = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - share) * slowed + share * frequencies
    kept = torch.where(wavelengths < shortest, frequencies, blended)
    return torch.where(wavelengths > longest, slowed, kept)


def rotation_table(rope: RopeConfig, head_dim: int, num_positions: int) -> torch.Tensor:
    """Return e^(i·position·frequency) / √√head_dim: [num_positions, 1, head_dim / 2], complex64.

    Queries and keys both take the root of attention's 1/√head_dim with their rotation: no operation
    of its own, and no rounding between.
    """
    angles = torch.outer(
        torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(rope, head_dim)
    )
    return torch.polar(torch.full_like(angles, head_dim**-0.25), angles).unsqueeze(1)


def mix_axes(axes: Sequence[torch.Tensor], sections: Sequence[int]) -> torch.Tensor:
    """Return rotations [rows, 1, head_dim / 2] of positions in space, from those of each of its axes.

    The first ``sections[0]`` pairs are those of the first axis, and so on, around again.
    """
    pieces = [torch.split_with_sizes(axis, list(sections), dim=-1) for axis in axes]
    return torch.cat([pieces[i % len(axes)][i] for i in range(len(sections))], dim=-1)


def pair_up(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder rows of a q or k projection, bias or norm so that rotated pairs are neighbours."""
    heads = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)


def rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate [rows, heads, head_dim] by [rows, 1, head_dim / 2]; result in the dtype of ``heads``."""
    rows, num_heads, head_dim = heads.shape
    pairs = torch.view_as_complex(heads.float().view(rows, num_heads, head_dim // 2, 2))
    return torch.view_as_real(pairs * rotation).view(rows, num_heads, head_dim).to(heads.dtype)

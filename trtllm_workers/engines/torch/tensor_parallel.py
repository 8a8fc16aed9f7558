"""How a model is cut over ranks. Knows shapes and sums, no file and no request.

Every rank has whole heads: q, k, v, gate and up are cut by their output, out and down by their input,
so that a layer needs two sums over ranks. Embeddings and norms are everywhere, the head on rank 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from trtllm_workers.engines.torch.linear import Linear
from trtllm_workers.engines.torch.model_config import ModelConfig
from trtllm_workers.engines.torch.ranks import Ranks
from trtllm_workers.errors import ConfigError


def check_divisible(config: ModelConfig, size: int, source: str, folder: Path) -> None:
    """Raise ConfigError, naming the sizes that would do, when a model cannot be cut into ``size``."""
    cut = {
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
    }
    wrong = [f"{name} {value}" for name, value in cut.items() if value % size]
    if wrong:
        most = math.gcd(*cut.values())
        fitting = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
        raise ConfigError(
            f"tensor_parallel_size {size} ({source}) does not divide {' and '.join(wrong)} of "
            f"{folder / 'config.json'}; this model can be cut into {fitting}",
            param="tensor_parallel_size",
        )


def share_of(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """Return the shape of one rank's part of the model."""
    return replace(
        config,
        num_heads=config.num_heads // ranks.size,
        num_kv_heads=config.num_kv_heads // ranks.size,
        intermediate_size=config.intermediate_size // ranks.size,
    )


class SummedLinear:
    """A product of which every rank has some of the inputs. All ranks call it at the same time.

    Parts are in the model's dtype. Bias and residual are added to their float32 sum, before the one
    rounding to the model's dtype.
    """

    def __init__(self, part: Linear, bias: torch.Tensor | None, ranks: Ranks) -> None:
        self.part = part
        self._bias = None if bias is None else bias.float()
        self._ranks = ranks

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        total = self._ranks.sum(self.part(x))
        if self._bias is not None:
            total += self._bias
        if residual is not None:
            total += residual
        return total.to(x.dtype)

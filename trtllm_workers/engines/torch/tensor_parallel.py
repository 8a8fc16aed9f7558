"""How a model is cut over ranks. Knows shapes, no file and no request.

Every product is cut by its outputs: a rank has whole heads of q, k and v, and as many rows of out, gate,
up and down. So no sum is cut, and every number comes out with the same bits as on a single rank; what
crosses ranks is only put side by side. Embeddings and norms are everywhere, the head is on rank 0.
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
        "hidden_size": config.hidden_size,
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
    """Return the shape of one rank's part of the model; the hidden size stays whole."""
    return replace(
        config,
        num_heads=config.num_heads // ranks.size,
        num_kv_heads=config.num_kv_heads // ranks.size,
        intermediate_size=config.intermediate_size // ranks.size,
    )


class GatheredLinear:
    """A product of which every rank has some inputs and computes some outputs; it returns all outputs.

    All ranks call it at the same time. Two exchanges instead of one sum over ranks: about as many bytes
    with two ranks, and a sum's order would depend on the number of ranks.
    """

    def __init__(self, part: Linear, num_outputs: int, ranks: Ranks) -> None:
        self.part = part
        self._ranks = ranks
        count = num_outputs // ranks.size
        self._own = slice(ranks.rank * count, (ranks.rank + 1) * count)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        own = None if residual is None else residual[:, self._own].contiguous()
        return self._ranks.side_by_side(self.part(self._ranks.side_by_side(x), own))

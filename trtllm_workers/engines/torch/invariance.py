"""Checks at start-up that rows do not depend on their batch, with the weights just loaded.

Greedy output that does not change with batch mates rests on kernels chosen by the torch build and
the processor. Rather than trusting a table of them, a few row counts are compared bit for bit. Knows
no request.
"""

from __future__ import annotations

import torch

from trtllm_workers.engines.torch.attention import QUERY_TILE, Span
from trtllm_workers.engines.torch.kv_memory import KvMemory
from trtllm_workers.engines.torch.linear import Linear
from trtllm_workers.engines.torch.model import Batch, Model

# Around the row counts where kernels were seen to change: one, small, a tile and its neighbours.
ROW_COUNTS = (1, 2, 5, 8, 16, 17, 33, 64, 150)
_PROMPT = 96


def rows_are_invariant(
    linear: Linear, inner: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether a product's rows are the same bits for every row count tried."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROW_COUNTS[-1], inner, generator=generator).to(device, dtype)
    whole = linear(x)
    return all(torch.equal(linear(x[:rows].contiguous()), whole[:rows]) for rows in ROW_COUNTS)


@torch.inference_mode()
def products_are_invariant(model: Model) -> bool:
    """Return whether a model's products keep rows apart: one of each shape is tried."""
    config = model.config
    hidden = config.hidden_size
    inners = (hidden, config.num_heads * config.head_dim, hidden, config.intermediate_size)
    checked = [*zip(model.linears[:4], inners, strict=True), (model.head, hidden)]
    return all(
        rows_are_invariant(linear, inner, model.dtype, model.device) for linear, inner in checked
    )


def forward_is_invariant(model: Model, block_size: int) -> bool:
    """Return whether a prompt's logits are the same at once, in pieces, alone and in a batch."""
    length = min(_PROMPT, model.max_positions)
    num_blocks = -(-length // block_size)
    tokens = [(7 * position) % model.config.vocab_size for position in range(length)]

    def memory() -> KvMemory:
        config = model.config
        return KvMemory(
            2 * num_blocks,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block_size,
            dtype=model.dtype,
            device=model.device,
        )

    def run(pool: KvMemory, first: int, end: int, copies: int = 1) -> torch.Tensor:
        count = end - first
        tables = [list(range(i * num_blocks, (i + 1) * num_blocks)) for i in range(copies)]
        batch = Batch(
            token_ids=tokens[first:end] * copies,
            positions=list(range(first, end)) * copies,
            spans=[Span(i * count, first, count, table) for i, table in enumerate(tables)],
            last_rows=[(i + 1) * count - 1 for i in range(copies)],
        )
        return model.forward(batch, pool)

    whole = run(memory(), 0, length)
    pieces, batched = memory(), memory()
    for first in range(0, length - 1, QUERY_TILE - 3):
        end = min(first + QUERY_TILE - 3, length - 1)
        run(pieces, first, end)
        run(batched, first, end, copies=2)
    last = run(pieces, length - 1, length)
    both = run(batched, length - 1, length, copies=2)
    return all(torch.equal(row, whole[0]) for row in (last[0], both[0], both[1]))

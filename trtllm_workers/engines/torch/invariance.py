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
_PIECE = QUERY_TILE - 3  # tiles and pieces end at different positions
_LAYERS = 2  # the others use the same kernels


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
    config = model.whole_config
    hidden = config.hidden_size
    inners = (hidden, config.num_heads * config.head_dim, hidden, config.intermediate_size)
    checked = list(zip(model.linears[:4], inners, strict=True))
    if model.head is not None:
        checked.append((model.head, hidden))
    return all(
        rows_are_invariant(linear, inner, model.dtype, model.device) for linear, inner in checked
    )


class ForwardCheck:
    """Compares logits of one prompt, computed in several ways by a model's first layers."""

    def __init__(self, model: Model, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        self._length = min(_PROMPT, model.max_positions)
        self._num_blocks = -(-self._length // block_size)
        vocab_size = model.config.vocab_size
        self._tokens = [(7 * position) % vocab_size for position in range(self._length)]

    def is_invariant(self) -> bool:
        """Return whether they are the same at once, in pieces, alone and in a batch."""
        last = self._length - 1
        whole = self._run(self._memory(), 0, self._length)
        pieces, batched = self._memory(), self._memory()
        for first in range(0, last, _PIECE):
            end = min(first + _PIECE, last)
            self._run(pieces, first, end)
            self._run(batched, first, end, copies=2)
        alone = self._run(pieces, last, self._length)
        both = self._run(batched, last, self._length, copies=2)
        return all(torch.equal(row, whole[0]) for row in (alone[0], both[0], both[1]))

    def threads_do_not_matter(self) -> bool:
        """Return whether they are the same with one thread as with those set now."""
        num_threads = torch.get_num_threads()
        several = self._prefill_and_decode()
        try:
            torch.set_num_threads(1)
            return torch.equal(self._prefill_and_decode(), several)
        finally:
            torch.set_num_threads(num_threads)

    def _prefill_and_decode(self) -> torch.Tensor:
        memory = self._memory()
        prefill = self._run(memory, 0, self._length - 1)
        return torch.cat((prefill, self._run(memory, self._length - 1, self._length)))

    def _run(self, pool: KvMemory, first: int, end: int, copies: int = 1) -> torch.Tensor:
        count = end - first
        tables = [
            list(range(copy * self._num_blocks, (copy + 1) * self._num_blocks))
            for copy in range(copies)
        ]
        batch = Batch(
            token_ids=self._tokens[first:end] * copies,
            positions=list(range(first, end)) * copies,
            spans=[Span(copy * count, first, count, table) for copy, table in enumerate(tables)],
            last_rows=[(copy + 1) * count - 1 for copy in range(copies)],
        )
        return self._model.forward(batch, pool, _LAYERS)

    def _memory(self) -> KvMemory:
        config = self._model.config
        return KvMemory(
            2 * self._num_blocks,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=self._block_size,
            dtype=self._model.dtype,
            device=self._model.device,
        )

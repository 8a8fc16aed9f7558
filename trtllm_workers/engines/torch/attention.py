"""Attention over gathered blocks, the same bits for a row however it is computed. Knows no layer.

A query row must not notice who else is in the batch, how the prompt was cut into chunks, or where
its blocks lie. So every row goes through the same sums:

* scores are products over head_dim alone, the same for any number of rows from ``min_rows`` up;
* softmax sums in float32 over a length padded to ``GRANULE`` with -inf, which adds exact zeros;
* values are summed in tiles of ``KEY_TILE`` keys whose results are added in order of position.

Decoding sequences are gathered in groups of about equal length; a group's gather fits the cache,
so its second reading costs no memory bandwidth. Prompts are computed per sequence in query tiles,
each over the keys it can see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch.nn import functional

from trtllm_workers.engines.torch.kv_memory import KvMemory

KEY_TILE = 256
QUERY_TILE = 64  # positions
GRANULE = 64
# Larger groups mean fewer calls; at this size a group still fits the last cache.
_GATHER_BYTES = 16 << 20
# With fewer rows float32 products take another kernel (measured: below 6).
_MIN_ROWS = {torch.float32: 8}


@dataclass(slots=True)
class Span:
    """Consecutive positions of one sequence in a step: rows ``first_row`` … of the batch."""

    first_row: int
    start: int
    count: int
    blocks: Seq[int]


@dataclass(slots=True)
class _Tile:
    """Query positions [first, end) of a span over keys [key_first, key_end).

    ``bias`` hides keys from ``key_masked`` on; every position sees those before.
    """

    first: int
    end: int
    key_first: int
    key_masked: int
    key_end: int
    bias: torch.Tensor


@dataclass(slots=True)
class _Group:
    """What a gather serves: one span cut into tiles, or single rows of many sequences.

    ``index`` holds rows of the pool at ``layer``.
    """

    rows: slice | torch.Tensor
    num_sequences: int
    length: int
    index: torch.Tensor
    tiles: list[_Tile] | None
    bias: torch.Tensor
    layer: int = 0


class AttentionPlan:
    """Everything about one step's attention that all layers share.

    ``window`` is the layer's sliding window; layers with different windows need plans of their own.
    """

    def __init__(
        self,
        memory: KvMemory,
        spans: Seq[Span],
        window: int | None,
        num_heads: int,
        min_rows: int | None = None,
    ) -> None:
        self._memory = memory
        self._window = window
        self._group = num_heads // memory.num_kv_heads
        self._device = memory.token_rows.device
        self._min_rows = _MIN_ROWS.get(memory.token_rows.dtype, 1) if min_rows is None else min_rows
        singles = sorted((s for s in spans if s.count == 1), key=lambda s: -s.start)
        self._groups = [self._prompt(span) for span in spans if span.count > 1]
        while singles:
            size = self._group_size(singles)
            self._groups.append(self._batch(singles[:size]))
            singles = singles[size:]

    def __call__(self, query: torch.Tensor, layer: int) -> torch.Tensor:
        """Return attention of ``query`` [rows, heads, dim] at ``layer``: [rows, heads × dim].

        Products of queries and keys come divided by √dim (see ``rope.py``).
        """
        first = self._groups[0]
        if len(self._groups) == 1 and isinstance(first.rows, slice):  # then it has all rows
            return self._attend(query, layer, first).reshape(query.shape[0], -1)
        out = query.new_empty(query.shape)
        for group in self._groups:
            out[group.rows] = self._attend(query[group.rows], layer, group)
        return out.view(out.shape[0], -1)

    def _attend(self, query: torch.Tensor, layer: int, group: _Group) -> torch.Tensor:
        memory = self._memory
        # In place: layers come in order, and a plan lives for one pass through them.
        index = group.index.add_((layer - group.layer) * memory.layer_stride)
        group.layer = layer
        gathered = memory.head_rows.index_select(0, index)
        keys, values = gathered.view(
            2, group.num_sequences * memory.num_kv_heads, group.length, memory.head_dim
        )
        if group.tiles is None:
            return self._decode(query, keys, values, group.bias)
        return self._prefill(query, keys, values, group.tiles)

    # --- computing -----------------------------------------------------------------------------

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        num, heads, dim = query.shape
        rows = query.reshape(keys.shape[0], self._group, dim)
        scores = self._scores(rows, keys)
        scores.view(num, -1, scores.shape[1], scores.shape[2]).add_(bias)
        mixed = self._mix(torch.softmax(scores, -1), values)
        return mixed[:, : self._group].reshape(num, heads, dim)

    def _prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tiles: list[_Tile],
    ) -> torch.Tensor:
        count, heads, dim = query.shape
        kv_heads = keys.shape[0]
        # Rows of one KV head: positions, and within a position the heads that share it.
        rows = query.reshape(count, kv_heads, self._group, dim).transpose(0, 1)
        rows = rows.reshape(kv_heads, count * self._group, dim)
        out = torch.empty_like(rows)
        for tile in tiles:
            part = slice(tile.first * self._group, tile.end * self._group)
            seen = slice(tile.key_first, tile.key_end)
            size = (tile.end - tile.first) * self._group
            scores = self._scores(rows[:, part], keys[:, seen])
            # Of the padding rows only that they are finite matters.
            masked = scores[:, :size, tile.key_masked - tile.key_first :]
            masked.view(kv_heads, -1, self._group, masked.shape[-1]).add_(tile.bias)
            out[:, part] = self._mix(torch.softmax(scores, -1), values[:, seen])[:, :size]
        shaped = out.view(kv_heads, count, self._group, dim).transpose(0, 1)
        return shaped.reshape(count, heads, dim)

    def _scores(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.bmm(_padded(rows, self._min_rows), keys.transpose(1, 2))

    def _mix(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        num, length, dim = values.shape
        if length <= KEY_TILE:
            return torch.bmm(weights, values)
        # All tiles in one product: each call to it costs as much as a small tile's arithmetic.
        num_tiles = length // KEY_TILE
        tiled = weights.view(num, -1, num_tiles, KEY_TILE).transpose(1, 2)
        parts = torch.bmm(
            tiled.reshape(num * num_tiles, -1, KEY_TILE),
            values.reshape(num * num_tiles, KEY_TILE, dim),
        ).view(num, num_tiles, -1, dim)
        total = parts[:, 0].float()
        for tile in range(1, num_tiles):
            total += parts[:, tile]
        return total.to(values.dtype)

    # --- planning ------------------------------------------------------------------------------

    def _group_size(self, singles: Seq[Span]) -> int:
        """Return how many of ``singles``, longest first, are gathered together."""
        memory = self._memory
        longest = self._padded_length(singles[0].start + 1)
        per_token = 2 * memory.num_kv_heads * memory.head_dim * memory.token_rows.itemsize
        most = max(1, _GATHER_BYTES // (per_token * longest))
        size = 1
        while size < min(most, len(singles)):
            length = self._padded_length(singles[size].start + 1)
            if length < longest * 0.75 and longest > KEY_TILE:
                break
            size += 1
        return size

    def _padded_length(self, length: int) -> int:
        """Return whole granules up to one key tile, whole tiles beyond."""
        granule = max(GRANULE, self._memory.block_size) if length <= KEY_TILE else KEY_TILE
        return -(-length // granule) * granule

    def _index(self, tables: Seq[Seq[int]], length: int) -> torch.Tensor:
        """Return rows of ``memory.head_rows`` at layer 0, by K or V, sequence, head, block."""
        memory = self._memory
        num_blocks = length // memory.block_size
        padded = [
            [*table[:num_blocks], *[memory.null_block] * (num_blocks - len(table))]
            for table in tables
        ]
        blocks = torch.tensor(padded, dtype=torch.int64) * memory.heads_per_block
        heads = memory.own_rows.view(2, 1, -1, 1)
        return (blocks.view(1, len(tables), 1, num_blocks) + heads).flatten().to(self._device)

    def _batch(self, singles: Seq[Span]) -> _Group:
        length = self._padded_length(singles[0].start + 1)
        positions = torch.tensor([span.start for span in singles])
        return _Group(
            rows=_rows([span.first_row for span in singles], self._device),
            num_sequences=len(singles),
            length=length,
            index=self._index([span.blocks for span in singles], length),
            tiles=None,
            bias=self._bias(positions, 0, length).view(len(singles), 1, 1, length),
        )

    def _prompt(self, span: Span) -> _Group:
        length = self._padded_length(span.start + span.count)
        tiles = []
        for first in range(0, span.count, QUERY_TILE):
            end = min(first + QUERY_TILE, span.count)
            key_end = self._padded_length(span.start + end)
            key_first, key_masked = 0, span.start + first
            if self._window is not None:
                oldest = max(0, span.start + first - self._window + 1)
                key_first = key_masked = oldest // KEY_TILE * KEY_TILE
            positions = torch.arange(span.start + first, span.start + end)
            bias = self._bias(positions, key_masked, key_end).view(end - first, 1, -1)
            tiles.append(_Tile(first, end, key_first, key_masked, key_end, bias))
        return _Group(
            rows=slice(span.first_row, span.first_row + span.count),
            num_sequences=1,
            length=length,
            index=self._index([span.blocks], length),
            tiles=tiles,
            bias=tiles[0].bias,
        )

    def _bias(self, positions: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return 0 where a position sees a key, -inf elsewhere: [positions, keys]."""
        keys = torch.arange(first, end)
        hidden = keys > positions.unsqueeze(1)
        if self._window is not None:
            hidden |= keys <= positions.unsqueeze(1) - self._window
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -math.inf)
        return bias.to(self._device, self._memory.token_rows.dtype)


def _rows(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """Return rows as a slice, which copies nothing, where they are neighbours."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _padded(rows: torch.Tensor, min_rows: int) -> torch.Tensor:
    missing = min_rows - rows.shape[1]
    return functional.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows

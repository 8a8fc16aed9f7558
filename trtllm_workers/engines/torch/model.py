"""The decoder of Llama, Qwen2, Qwen3 and Mistral: token ids to logits. Knows no request and no image.

One call computes all rows of a step, whatever sequences they belong to; every operation treats rows
independently (see ``linear.py`` and ``attention.py`` for the two where that takes care).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from trtllm_workers.engines.torch.attention import AttentionPlan, Span
from trtllm_workers.engines.torch.checkpoint import Checkpoint, Part
from trtllm_workers.engines.torch.kv_memory import KvMemory
from trtllm_workers.engines.torch.linear import Linear, can_pack, make_linear
from trtllm_workers.engines.torch.model_config import ModelConfig
from trtllm_workers.engines.torch.ranks import ALONE, Ranks
from trtllm_workers.engines.torch.rope import mix_axes, pair_up, rotate, rotation_table
from trtllm_workers.engines.torch.tensor_parallel import GatheredLinear, share_of
from trtllm_workers.engines.torch.vl_config import TEXT_PREFIXES


@dataclass(slots=True)
class InSpace:
    """Positions of neighbouring rows from ``first_row`` on that differ by axis: a list each."""

    first_row: int
    axes: tuple[Seq[int], ...]


@dataclass(slots=True)
class Batch:
    """One step's rows. ``last_rows`` are those whose logits are wanted.

    ``given`` are rows that go into the layers as they are, not by their token ids: (first row of the batch,
    rows [count, hidden] in any memory), in order. ``in_space`` are rows whose positions differ by axis.
    """

    token_ids: list[int]
    positions: list[int]
    spans: list[Span]
    last_rows: list[int]
    given: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    in_space: list[InSpace] = field(default_factory=list)


@dataclass(slots=True)
class _Layer:
    window: int | None
    input_norm: torch.Tensor
    qkv: Linear
    qk_norm: torch.Tensor | None
    out: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Model:
    """Weights on ``device``, packed for its kernels, and the forward pass.

    With several ranks it is this rank's part: ``config`` has the heads that are here, and all ranks
    run ``forward`` at the same time.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int,
        pack: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self.whole_config = config
        self._ranks = ranks
        self.config = share_of(config, ranks)
        self.device = device
        self.dtype = dtype
        self.packed = pack and can_pack(device, dtype)
        self.max_positions = max_positions
        self.min_rows: int | None = None  # attention's own choice
        self._checkpoint = checkpoint
        self._prefix = _prefix_of(config, checkpoint)
        self._layers = [self._load_layer(index) for index in range(config.num_layers)]
        self._norm = self._vector(f"{self._prefix}norm.weight", config.hidden_size)
        embedding = checkpoint.take(
            f"{self._prefix}embed_tokens.weight", config.vocab_size, config.hidden_size
        )
        # Only rank 0 samples.
        self.head: Linear | None = None
        if ranks.rank == 0:
            head = embedding
            if not config.tied_embeddings:
                name = checkpoint.first_of("lm_head.weight", "language_model.lm_head.weight")
                head = checkpoint.take(name, config.vocab_size, config.hidden_size)
            self.head = self._pack(head, None)
        self._embedding = embedding.to(device, copy=True)
        self._rotations = rotation_table(config.rope, config.head_dim, max_positions).to(device)
        del self._checkpoint

    @property
    def linears(self) -> list[Linear]:
        """Every layer's four products, in order, as far as this rank computes them; not the head."""
        return [
            linear.part if isinstance(linear, GatheredLinear) else linear
            for layer in self._layers
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]

    @torch.inference_mode()
    def forward(
        self, batch: Batch, memory: KvMemory, num_layers: int | None = None
    ) -> torch.Tensor:
        """Return logits [len(last_rows), vocab] and write the rows' K and V to ``memory``.

        Ranks above 0 return what they would be computed from: [len(last_rows), hidden].
        ``num_layers`` stops after the first layers: for checks, where all layers are alike.
        """
        config = self.config
        device = self.device
        positions = torch.tensor(batch.positions, device=device)
        rotation = self._rotations.index_select(0, positions)
        for rows in batch.in_space:
            self._turn_in_space(rotation, rows)
        slots = self._slots(batch, memory)
        plans = {
            window: AttentionPlan(memory, batch.spans, window, config.num_heads, self.min_rows)
            for window in set(config.windows)
        }
        x = self._embed(batch)
        for index, layer in enumerate(self._layers[:num_layers]):
            x = self._attend(x, index, layer, rotation, slots, plans[layer.window], memory)
            x = self._transform(x, layer)
        if not batch.last_rows:
            return x.new_empty((0, config.hidden_size if self.head is None else config.vocab_size))
        if len(batch.last_rows) != len(batch.positions):
            x = x.index_select(0, torch.tensor(batch.last_rows, device=device))
        x = self._normed(x, self._norm)
        return x if self.head is None else self.head(x)

    def _attend(
        self,
        x: torch.Tensor,
        index: int,
        layer: _Layer,
        rotation: torch.Tensor,
        slots: torch.Tensor,
        attention: AttentionPlan,
        memory: KvMemory,
    ) -> torch.Tensor:
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        heads = layer.qkv(self._normed(x, layer.input_norm))
        heads = heads.view(x.shape[0], -1, config.head_dim)
        rotated = heads[:, :num_rotated]
        if layer.qk_norm is not None:
            size = (config.head_dim,)
            rotated = functional.rms_norm(rotated, size, None, config.norm_eps) * layer.qk_norm
        rotated = rotate(rotated, rotation)
        keys, values = rotated[:, config.num_heads :], heads[:, num_rotated:]
        memory.token_rows.index_copy_(0, slots[index, 0], keys.reshape(-1, config.head_dim))
        memory.token_rows.index_copy_(0, slots[index, 1], values.reshape(-1, config.head_dim))
        return layer.out(attention(rotated[:, : config.num_heads], index), x)

    def _transform(self, x: torch.Tensor, layer: _Layer) -> torch.Tensor:
        gate, up = layer.gate_up(self._normed(x, layer.post_norm)).chunk(2, dim=-1)
        return layer.down(functional.silu(gate).mul_(up), x)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (self.config.hidden_size,), weight, self.config.norm_eps)

    def _embed(self, batch: Batch) -> torch.Tensor:
        """Return what goes into the first layer: rows given, and embeddings of all other tokens."""
        ids = torch.tensor(batch.token_ids, device=self.device)
        if not batch.given:
            return self._embedding.index_select(0, ids)
        x = self._embedding.new_empty((len(batch.token_ids), self.config.hidden_size))
        at = 0
        for first, given in batch.given:
            torch.index_select(self._embedding, 0, ids[at:first], out=x[at:first])
            at = first + given.shape[0]
            x[first:at].copy_(given)
        torch.index_select(self._embedding, 0, ids[at:], out=x[at:])
        return x

    def _turn_in_space(self, rotation: torch.Tensor, rows: InSpace) -> None:
        axes = [
            self._rotations.index_select(0, torch.tensor(axis, device=self.device))
            for axis in rows.axes
        ]
        mixed = mix_axes(axes, self.config.rope.sections)
        rotation[rows.first_row : rows.first_row + mixed.shape[0]].copy_(mixed)

    def _slots(self, batch: Batch, memory: KvMemory) -> torch.Tensor:
        """Return rows of ``memory.token_rows``: [layer, K or V, batch row × KV head]."""
        size = memory.block_size
        firsts = [
            span.blocks[position // size] * memory.heads_per_block * size + position % size
            for span in batch.spans
            for position in range(span.start, span.start + span.count)
        ]
        layers = torch.arange(self.config.num_layers).view(-1, 1, 1, 1) * memory.layer_stride
        heads = (layers + memory.own_rows.view(1, 2, 1, -1)) * size
        return (torch.tensor(firsts).view(-1, 1) + heads).flatten(2).to(self.device)

    # --- loading -------------------------------------------------------------------------------

    def _load_layer(self, index: int) -> _Layer:
        config = self.whole_config
        name = f"{self._prefix}layers.{index}"
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size = config.num_heads * config.head_dim
        return _Layer(
            window=config.windows[index],
            input_norm=self._vector(f"{name}.input_layernorm.weight", hidden),
            qkv=self._load_qkv(f"{name}.self_attn"),
            qk_norm=self._load_qk_norm(f"{name}.self_attn") if config.qk_norm else None,
            out=self._gathered(f"{name}.self_attn.o_proj", hidden, q_size, config.o_bias),
            post_norm=self._vector(f"{name}.post_attention_layernorm.weight", hidden),
            gate_up=self._gate_up(f"{name}.mlp", inner, hidden, config.mlp_bias),
            down=self._gathered(f"{name}.mlp.down_proj", hidden, inner, config.mlp_bias),
        )

    def _load_qkv(self, name: str) -> Linear:
        config = self.whole_config
        weights: list[torch.Tensor] = []
        biases: list[torch.Tensor] = []
        for part, num_heads in (
            ("q", config.num_heads),
            ("k", config.num_kv_heads),
            ("v", config.num_kv_heads),
        ):
            size = num_heads * config.head_dim
            found = [self._rows(f"{name}.{part}_proj.weight", size, config.hidden_size)]
            if config.qkv_bias:
                found.append(self._rows(f"{name}.{part}_proj.bias", size))
            if part != "v":
                found = [pair_up(tensor, config.head_dim) for tensor in found]
            weights.append(found[0])
            biases += found[1:]
        return self._pack(torch.cat(weights), torch.cat(biases) if biases else None)

    def _load_qk_norm(self, name: str) -> torch.Tensor:
        """Return the norms of all q and k heads: [heads + KV heads, head_dim]."""
        config = self.config
        norms = [
            pair_up(
                self._checkpoint.take(f"{name}.{part}_norm.weight", config.head_dim),
                config.head_dim,
            ).expand(num_heads, -1)
            for part, num_heads in (("q", config.num_heads), ("k", config.num_kv_heads))
        ]
        return torch.cat(norms).to(self.device)

    def _gate_up(self, name: str, rows: int, columns: int, bias: bool) -> Linear:
        names = [f"{name}.gate_proj", f"{name}.up_proj"]
        weights = [self._rows(f"{each}.weight", rows, columns) for each in names]
        biases = [self._rows(f"{each}.bias", rows) for each in names if bias]
        return self._pack(torch.cat(weights), torch.cat(biases) if biases else None)

    def _gathered(self, name: str, rows: int, columns: int, bias: bool) -> Linear:
        """Load a product whose inputs are spread over ranks, and whose outputs are wanted everywhere."""
        weight = self._rows(f"{name}.weight", rows, columns)
        linear = self._pack(weight, self._rows(f"{name}.bias", rows) if bias else None)
        return linear if self._ranks.size == 1 else GatheredLinear(linear, rows, self._ranks)

    def _rows(self, name: str, *shape: int) -> torch.Tensor:
        """Load this rank's rows of a weight or bias."""
        if self._ranks.size == 1:
            return self._checkpoint.take(name, *shape)
        count = shape[0] // self._ranks.size
        return self._checkpoint.take(name, *shape, part=Part(self._ranks.rank * count, count))

    def _pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return make_linear(weight, bias, device=self.device, packed=self.packed)

    def _vector(self, name: str, size: int) -> torch.Tensor:
        return self._checkpoint.take(name, size).to(self.device, copy=True)


def _prefix_of(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """Return what the names of the decoder's weights begin with in this checkpoint."""
    name = "embed_tokens.weight"
    prefixes = ("model.",) if config.vision is None else TEXT_PREFIXES
    return checkpoint.first_of(*(f"{prefix}{name}" for prefix in prefixes)).removesuffix(name)

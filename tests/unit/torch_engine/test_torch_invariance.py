"""Rows do not depend on their batch: the kernels' promise, on this machine and torch build."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trtllm_workers.engines.torch.attention import AttentionPlan, Span
from trtllm_workers.engines.torch.invariance import rows_are_invariant
from trtllm_workers.engines.torch.kv_memory import KvMemory
from trtllm_workers.engines.torch.linear import BucketLinear, can_pack, make_linear
from trtllm_workers.engines.torch.model_config import RopeConfig
from trtllm_workers.engines.torch.rope import rotate, rotation_table

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 150, 257, 777, 1500, 4096)
# (out, in): a demo model's, a 125M model's and longer sums, which bfloat16 splits.
SHAPES = ((192, 64), (96, 24), (1280, 768), (768, 768), (4096, 768), (768, 2048), (256, 3072))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_packed_product_is_the_same_for_1_to_4096_rows(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip(f"oneDNN packs no {dtype} weights on this processor")
    out_size, in_size = shape
    weight = (normal(*shape) / in_size**0.5).to(dtype)
    bias = normal(out_size, seed=1).to(dtype)
    linear = make_linear(weight, bias, device=CPU, packed=True)
    x = normal(ROWS[-1], in_size, seed=2).to(dtype)
    residual = normal(ROWS[-1], out_size, seed=3).to(dtype)
    for added in (None, residual):
        whole = linear(x, None if added is None else added.clone())
        for rows in ROWS[:-1]:
            for first in (0, ROWS[-1] - rows):
                part = slice(first, first + rows)
                beside = None if added is None else added[part].clone()
                assert torch.equal(linear(x[part].clone(), beside), whole[part]), rows
    expected = x.double() @ weight.double().T + bias.double() + residual.double()
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert (whole.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_product_does_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip(f"oneDNN packs no {dtype} weights on this processor")
    linear = make_linear(normal(768, 2048).to(dtype), None, device=CPU, packed=True)
    x = normal(70, 2048, seed=1).to(dtype)
    one = [linear(x[:rows].clone()) for rows in (1, 70)]
    torch.set_num_threads(2)
    assert all(torch.equal(linear(x[: len(o)].clone()), o) for o in one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bucket_product_keeps_rows_apart_and_is_right(dtype: torch.dtype) -> None:
    weight, bias = normal(96, 200).to(dtype), normal(96, seed=1).to(dtype)
    linear = BucketLinear(weight, bias, bucket=32)
    assert rows_are_invariant(linear, 200, dtype, CPU)
    x = normal(45, 200, seed=2).to(dtype)
    expected = functional.linear(x.double(), weight.double(), bias.double()) + 1
    error = linear(x, torch.ones(45, 96, dtype=dtype)).double() - expected
    assert error.abs().max() < (1e-4 if dtype is torch.float32 else 0.5)


def test_the_check_finds_a_product_whose_rows_depend_on_their_number() -> None:
    def dependent(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return x + (1e-6 if x.shape[0] > 8 else 0)

    assert not rows_are_invariant(dependent, 16, torch.float32, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 768, 1000])
def test_norm_activation_and_rotation_keep_rows_apart(size: int, dtype: torch.dtype) -> None:
    x, weight = normal(300, size).to(dtype), normal(size, seed=1).to(dtype)
    rotations = rotation_table(RopeConfig(10_000.0), 8, 300)

    def all_of(first: int, end: int) -> list[torch.Tensor]:
        rows = x[first:end].clone()
        heads = rows[:, :48].reshape(-1, 6, 8)
        return [
            functional.rms_norm(rows, (size,), weight, 1e-5),
            functional.silu(rows[:, : size // 2]) * rows[:, size // 2 :][:, : size // 2],
            rotate(heads, rotations[first:end]),
        ]

    whole = all_of(0, 300)
    for first, end in ((0, 1), (7, 8), (299, 300), (3, 20), (100, 229)):
        for part, expected in zip(all_of(first, end), whole, strict=True):
            assert torch.equal(part, expected[first:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(12, 4, 64), (4, 4, 16), (7, 1, 128), (8, 2, 24)]
)
def test_attention_is_the_same_in_any_chunk_batch_and_place(
    heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    length, block_size = 700, 16
    keys, values = (normal(length, kv_heads, dim, seed=s).to(dtype) for s in (1, 2))
    query = normal(length, heads, dim, seed=3).to(dtype) * dim**-0.5
    num_blocks = -(-length // block_size)

    def filled(table: list[int]) -> KvMemory:
        memory = KvMemory(
            2 * num_blocks,
            num_layers=1,
            num_kv_heads=kv_heads,
            head_dim=dim,
            block_size=block_size,
            dtype=dtype,
            device=CPU,
        )
        rows = memory.token_rows.view(-1, 2, kv_heads, block_size, dim)
        for position in range(length):
            block, offset = table[position // block_size], position % block_size
            rows[block, 0, :, offset] = keys[position]
            rows[block, 1, :, offset] = values[position]
        return memory

    def attend(memory: KvMemory, table: list[int], *chunks: tuple[int, int]) -> torch.Tensor:
        rows = [position for first, end in chunks for position in range(first, end)]
        spans, start = [], 0
        for first, end in chunks:
            spans.append(Span(start, first, end - first, table))
            start += end - first
        return AttentionPlan(memory, spans, window, heads)(query[rows], 0)

    straight = list(range(num_blocks))
    scattered = [2 * num_blocks - 1 - 2 * block for block in range(num_blocks)]
    near, far = filled(straight), filled(scattered)
    whole = attend(near, straight, (0, length))
    for end in (1, 5, 64, 65, 130, 256, 257, 513, 699):
        assert torch.equal(attend(far, scattered, (0, end)), whole[:end])
    for first, end in ((1, 3), (63, 200), (256, 258), (500, 700)):
        assert torch.equal(attend(far, scattered, (first, end)), whole[first:end])
    singles = [0, 6, 63, 64, 255, 256, 300, 511, 512, 640, 699]
    together = attend(far, scattered, *((p, p + 1) for p in singles))
    assert torch.equal(together, whole[singles])
    for position in singles:
        assert torch.equal(attend(near, straight, (position, position + 1))[0], whole[position])
    mixed = attend(near, straight, (5, 6), (10, 90), (699, 700))
    assert torch.equal(mixed, whole[[5, *range(10, 90), 699]])
    expected = reference(query, keys, values, window)
    assert (whole.double() - expected).abs().max() < (1e-5 if dtype is torch.float32 else 0.03)


def reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> torch.Tensor:
    length, heads, _dim = query.shape
    position = torch.arange(length)
    seen = position.unsqueeze(0) <= position.unsqueeze(1)
    if window is not None:
        seen &= position.unsqueeze(0) > position.unsqueeze(1) - window
    group = heads // keys.shape[1]
    q, k, v = (t.double().transpose(0, 1) for t in (query, keys, values))
    k, v = (t.repeat_interleave(group, 0) for t in (k, v))
    scores = (q @ k.transpose(1, 2)).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1)

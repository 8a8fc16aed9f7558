"""Logits agree with transformers' own models on the same random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.torch_engine.conftest import FAMILIES
from tests.unit.torch_engine.driver import prompt_of
from trtllm_workers.engines.torch.attention import Span
from trtllm_workers.engines.torch.loading import Loaded
from trtllm_workers.engines.torch.model import Batch

LENGTH = 150


def ours(loaded: Loaded, tokens: list[int]) -> torch.Tensor:
    blocks = list(range(-(-len(tokens) // loaded.info.block_size)))
    rows = list(range(len(tokens)))
    batch = Batch(tokens, rows, [Span(0, 0, len(tokens), blocks)], rows)
    return loaded.model.forward(batch, loaded.memory)


def theirs(folder: Path, tokens: list[int], dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("name", [name for name in FAMILIES if "bfloat16" not in name])
def test_float32_logits_are_those_of_transformers(
    name: str, loaded: Callable[..., Loaded], model_folder: Callable[[str], Path]
) -> None:
    tokens = prompt_of(0, LENGTH)
    reference = theirs(model_folder(name), tokens, torch.float32)
    torch.testing.assert_close(ours(loaded(name), tokens), reference, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "bfloat16" in name])
def test_bfloat16_logits_are_as_near_to_the_truth_as_those_of_transformers(
    name: str, loaded: Callable[..., Loaded], model_folder: Callable[[str], Path]
) -> None:
    tokens = prompt_of(0, LENGTH)
    truth = theirs(model_folder(name), tokens, torch.float32)
    error = (ours(loaded(name), tokens).float() - truth).abs().mean()
    peer_error = (theirs(model_folder(name), tokens, torch.bfloat16).float() - truth).abs().mean()
    assert error < 1.2 * peer_error


def test_windows_and_rope_scaling_change_logits(loaded: Callable[..., Loaded]) -> None:
    # Otherwise the comparisons above would say nothing of them.
    tokens = prompt_of(0, LENGTH)
    plain, windowed = (ours(loaded(name), tokens) for name in ("qwen2", "qwen2_window"))
    torch.testing.assert_close(plain[:20], windowed[:20], rtol=1e-4, atol=2e-4)
    assert (plain[30:] - windowed[30:]).abs().amax(-1).min() > 0.01

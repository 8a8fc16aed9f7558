"""Tiny models and engines for the torch engine's tests; everything computes with one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.tiny_models import make_tiny_checkpoint
from tests.unit.torch_engine.driver import Driver
from tests.unit.torch_engine.seer import Seer
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.torch.loading import Loaded, load
from trtllm_workers.engines.torch.settings import KEYS

# One model per kind of attention and weights the engine knows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_bfloat16": {"family": "llama", "dtype": "bfloat16"},
    "llama_llama3_rope": {
        "family": "llama",
        "extra_config": {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "attention_bias": True,
            "mlp_bias": True,
        },
    },
    "llama_linear_rope": {
        "family": "llama",
        "extra_config": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "tie_word_embeddings": True,
        "head_dim": 32,
        "num_kv_heads": 1,
    },
    "qwen2": {},
    "qwen2_window": {"family": "qwen2", "sliding_window": 20},
    "qwen3": {"head_dim": 24},
    "mistral_window": {"family": "mistral", "sliding_window": 16},
    # Sums longer than 1024, which bfloat16 splits.
    "wide_bfloat16": {
        "family": "llama",
        "dtype": "bfloat16",
        "hidden_size": 128,
        "intermediate_size": 2304,
    },
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of one of FAMILIES, written once."""
    root = tmp_path_factory.mktemp("tiny_models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            options = {"family": name, **FAMILIES[name]}
            make_tiny_checkpoint(path, options.pop("family"), **options)
        return path

    return folder


@pytest.fixture
def loaded(model_folder: Callable[[str], Path]) -> Callable[..., Loaded]:
    """Load one of FAMILIES under the given settings (``__`` for the dot)."""

    def make(name: str = "llama", **settings: Any) -> Loaded:
        chosen = {
            "max_batch_size": 32,
            "kv_cache_config__tokens_per_block": 16,
            "kv_cache_config__max_tokens": 8192,
            **settings,
        }
        config = default_config("torch", KEYS, **chosen)
        return load(model_folder(name), config, lambda _share: None)

    return make


@pytest.fixture
def driver(loaded: Callable[..., Loaded]) -> Callable[..., Driver]:
    """A core with its own pool; ``reuse`` and ``chunked`` are the core's, the rest are settings."""

    def make(
        name: str = "llama", *, reuse: bool = True, chunked: bool = True, **settings: Any
    ) -> Driver:
        return Driver(loaded(name, **settings), reuse=reuse, chunked=chunked)

    return make


@pytest.fixture
def seer(vision_model: Callable[[str], Path]) -> Callable[..., Seer]:
    def make(family: str, *, reuse: bool = True, chunked: bool = True, **settings: Any) -> Seer:
        chosen = {
            "max_batch_size": 32,
            "kv_cache_config__tokens_per_block": 16,
            "kv_cache_config__max_tokens": 4096,
            **settings,
        }
        folder = vision_model(family)
        loaded = load(folder, default_config("torch", KEYS, **chosen), lambda _share: None)
        return Seer(Driver(loaded, reuse=reuse, chunked=chunked), folder)

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep tests from waiting for each other's threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

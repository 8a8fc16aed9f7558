"""Every engine the contract suite runs on, and how to build and kill one. Holds no test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.config.keys import EngineConfig, Setting, default_config
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.engines.registry import KEYED_ENGINES, build_engine, engine_keys
from trtllm_workers.engines.trtllm.engine import TrtllmEngine

VOCAB_SIZE = 512
BLOCK_SIZE = 16

# Small enough that prompts of a hundred tokens fill blocks, chunks and pools.
SETTINGS: dict[str, Any] = {
    "max_batch_size": 32,
    "max_num_tokens": 512,
    "max_seq_len": 256,
    "enable_chunked_prefill": True,
    "kv_cache_config__tokens_per_block": BLOCK_SIZE,
    "kv_cache_config__max_tokens": 4096,
    "kv_cache_config__enable_block_reuse": True,
}

Kill = Callable[[pytest.MonkeyPatch, Engine], None]


@dataclass(frozen=True)
class EngineKind:
    """One engine, in one variant.

    ``moves_own_kv``: its blocks cannot be read or written here. ``figures_lag``: its steps and blocks are
    polled, so they may be those of a step ago, and it tells of no preemption.

    ``write_checkpoint`` makes a model folder; its second argument is the eos token ids. ``extra`` are
    engine options of every build, ``often_eos`` those that make eos likely when half the vocabulary
    is eos. ``kill`` makes a started engine's next step fail for good.
    """

    name: str
    engine: str
    write_checkpoint: Callable[[Path, list[int]], None]
    kill: Kill
    settings: Mapping[str, Any] = field(default_factory=dict)
    moves_own_kv: bool = False
    figures_lag: bool = False
    cost: Mapping[str, Any] | None = None
    often_eos: Mapping[str, Any] | None = None

    @property
    def model(self) -> str:
        """What its variants have in common: the engine and the model."""
        return f"{self.engine}{self.write_checkpoint.__name__}"

    def build(self, model_path: Path, *, often_eos: bool = False, **overrides: Any) -> Engine:
        """Return an engine, not started. ``overrides`` are engine-config keys, ``__`` for the dot."""
        settings = {**SETTINGS, **self.settings, **overrides}
        if self.engine in KEYED_ENGINES:
            config = default_config(self.engine, engine_keys(self.engine), **settings)
        else:
            given = {
                name.replace("__", "."): Setting(value, "test") for name, value in settings.items()
            }
            config = EngineConfig(self.engine, given)
        extra = {}
        if self.cost is not None:
            cost = {**self.cost, **(self.often_eos or {} if often_eos else {})}
            path = model_path.parent / f"{self.name}-{'eos' if often_eos else 'cost'}.yaml"
            path.write_text(json.dumps(cost))  # JSON is YAML
            extra["cost_path"] = str(path)
        return build_engine(self.engine, EngineOptions(model_path, config, extra=extra))


def _write_config_only(path: Path, eos: list[int]) -> None:
    path.mkdir(parents=True)
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 2048, "eos_token_id": eos}
    (path / "config.json").write_text(json.dumps(config))


def _write_tiny_llama(path: Path, eos: list[int]) -> None:
    from tests.fakes.tiny_models import make_tiny_checkpoint  # imports torch

    make_tiny_checkpoint(path, vocab_size=VOCAB_SIZE, eos_token_id=eos)


def _write_tiny_qwen2_vl(path: Path, eos: list[int]) -> None:
    from safetensors.torch import load_file, save_file

    from trtllm_workers.demo.vision import write_vision_model  # imports torch and transformers

    write_vision_model(path, "qwen2_vl")
    # The suite's vocabulary, with a placeholder that none of its prompts holds.
    weights = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:VOCAB_SIZE].clone()
    save_file(weights, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config |= {"vocab_size": VOCAB_SIZE, "image_token_id": 0}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))


def _break_plan_of(engine: str) -> Kill:
    def broken(_self: object) -> None:
        raise RuntimeError("a step failed")

    def kill(monkeypatch: pytest.MonkeyPatch, _engine: Engine) -> None:
        monkeypatch.setattr(f"trtllm_workers.engines.{engine}.scheduler.Scheduler.plan", broken)

    return kill


def _kill_trtllm(_monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    assert isinstance(engine, TrtllmEngine)
    engine._llm.die(RuntimeError("a step failed"))


_FREE: dict[str, Any] = {"decode": {"base_ms": 0}}
_PACED: dict[str, Any] = {"prefill": {"per_token_us": 2}, "decode": {"base_ms": 0.3}}
_EOS: dict[str, Any] = {"eos_probability": 0.5}


def _sim(name: str, cost: Mapping[str, Any], **settings: Any) -> EngineKind:
    kill = _break_plan_of("sim")
    return EngineKind(name, "sim", _write_config_only, kill, settings, cost=cost, often_eos=_EOS)


# 20 blocks for up to 32 running requests: the whole suite runs under preemption.
SMALL_POOL = 20 * BLOCK_SIZE


_TRTLLM: dict[str, Any] = {
    "enable_iter_perf_stats": True,
    "kv_cache_config__event_buffer_max_size": 4096,
    "cache_transceiver_config__backend": "UCX",
    "cache_transceiver_config__kv_transfer_timeout_ms": 5000,
}

KINDS = (
    _sim("sim", _FREE),
    _sim("sim_paced", _PACED),
    _sim("sim_small_pool", _FREE, kv_cache_config__max_tokens=SMALL_POOL),
    EngineKind("torch", "torch", _write_tiny_llama, _break_plan_of("torch")),
    # What a model of images does with text alone.
    EngineKind("torch_vision", "torch", _write_tiny_qwen2_vl, _break_plan_of("torch")),
    # The adapter, on the stand-in that conftest.py puts in TensorRT-LLM's place.
    EngineKind(
        "trtllm",
        "trtllm",
        _write_tiny_llama,
        _kill_trtllm,
        _TRTLLM,
        moves_own_kv=True,
        figures_lag=True,
    ),
)

# Their blocks can be read and written here.
POOL_KINDS = tuple(kind for kind in KINDS if not kind.moves_own_kv)

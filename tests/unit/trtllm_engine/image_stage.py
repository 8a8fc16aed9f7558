"""Adapters of a model with eyes on the stand-in, and what they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from tests.fakes.seeing import HIDDEN
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.engines.base import EngineOptions, generate
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.trtllm.engine import TrtllmEngine
from trtllm_workers.types import FinishReason, GenerateRequest

KEYS: dict[str, Any] = {
    "max_batch_size": 8,
    "max_num_tokens": 64,
    "max_seq_len": 256,
    "enable_chunked_prefill": True,
    "enable_iter_perf_stats": True,
    "kv_cache_config.tokens_per_block": 8,
    "kv_cache_config.max_tokens": 2048,
    "kv_cache_config.event_buffer_max_size": 256,
}
NATIVE = {
    "cache_transceiver_config.backend": "UCX",
    "cache_transceiver_config.kv_transfer_timeout_ms": 5000,
}


def build(model: Path, role: str = "aggregated", **options: Any) -> TrtllmEngine:
    keys = {**KEYS, **(NATIVE if role in ("prefill", "decode") else {})}
    config = EngineConfig("trtllm", {key: Setting(value, "test") for key, value in keys.items()})
    engine = build_engine("trtllm", EngineOptions(model, config, extra={"role": role}, **options))
    assert isinstance(engine, TrtllmEngine)
    return engine


@asynccontextmanager
async def started(model: Path, role: str = "aggregated", **options: Any) -> AsyncIterator[Any]:
    engine = build(model, role, **options)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


async def tokens_of(engine: TrtllmEngine, request: GenerateRequest) -> list[int]:
    async with asyncio.timeout(30):
        chunks = [chunk async for chunk in generate(engine, request)]
    assert chunks[-1].finish_reason is FinishReason.LENGTH, chunks[-1]
    return [token for chunk in chunks for token in chunk.token_ids]


def seen_by(engine: TrtllmEngine) -> dict[str, Any]:
    found: dict[str, Any] = engine._llm.fake.seen[-1]
    return found


def rows_of(seed: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))

"""The correctness gate's verdicts, with probes that behave in every way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.fakes.tiny_models import make_tiny_checkpoint
from tests.unit.worker.cluster import config_of
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.errors import TransferFailed
from trtllm_workers.types import EngineInfo, GenerateRequest, TokenChunk
from trtllm_workers.worker import canary as canary_module
from trtllm_workers.worker.canary import NUM_TOKENS, Canary, ProbeOut, Verdict, probe_prompt


async def started(tmp_path: Path) -> tuple[Engine, EngineInfo]:
    folder = make_tiny_checkpoint(tmp_path / "model")
    engine = build_engine("sim", EngineOptions(model_path=folder, config=config_of("sim")))
    return engine, await engine.start()


@pytest.mark.parametrize("verdict", list(Verdict))
async def test_each_verdict_has_its_cause(
    tmp_path: Path, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, info = await started(tmp_path)
    if verdict is Verdict.BUSY:
        monkeypatch.setattr(canary_module, "TIMEOUT_S", 0.2)

    async def probe(request: GenerateRequest, out: ProbeOut) -> None:
        if verdict is Verdict.FAILED:
            raise TransferFailed("the wire broke")
        if verdict is Verdict.BUSY:
            await asyncio.Event().wait()
        elif verdict is Verdict.MISMATCH:
            engine.submit(request, lambda chunk: out(wrong(chunk)))
        else:
            engine.submit(request, out)

    def wrong(chunk: TokenChunk) -> TokenChunk:
        return TokenChunk(tuple(token + 1 for token in chunk.token_ids), chunk.finish_reason)

    canary = Canary("d0", engine, info)
    found, reason = await canary.compare(probe)
    assert found is verdict
    assert bool(reason) == (verdict is not Verdict.PASSED)
    assert not canary.running
    assert await engine.holdings() == {}
    await engine.close()


async def test_a_worker_whose_own_tokens_change_blames_nobody(tmp_path: Path) -> None:
    engine, info = await started(tmp_path)

    async def probe(request: GenerateRequest, out: ProbeOut) -> None:
        canary._reference = [1, 2, 3]  # as if computed by a worker that has changed since
        engine.submit(request, out)

    canary = Canary("d0", engine, info)
    canary._reference = [1, 2, 3]
    found, reason = await canary.compare(probe)
    assert found is Verdict.FAILED
    assert "this worker's own tokens changed" in reason
    await engine.close()


async def test_probes_are_alike_but_never_share_a_cache(tmp_path: Path) -> None:
    engine, info = await started(tmp_path)
    canary = Canary("d0", engine, info)
    first, second = canary.request(), canary.request()
    assert first.prompt_token_ids == second.prompt_token_ids
    assert first.cache_salt != second.cache_salt
    assert first.request_id != second.request_id
    await engine.close()


async def test_the_prompt_fits_small_engines(tmp_path: Path) -> None:
    import msgspec

    engine, info = await started(tmp_path)
    whole = probe_prompt(info)
    assert len(whole) == 2 * info.block_size + info.block_size // 2
    assert all(0 <= token < info.vocab_size for token in whole)
    assert not set(whole) & set(info.eos_token_ids)
    small = msgspec.structs.replace(info, max_seq_len=NUM_TOKENS + 3)
    assert probe_prompt(small) == whole[:3]
    await engine.close()

"""The adapter on the stand-in: what it asks of TensorRT-LLM, and what it makes of its failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.stand_in import tensorrt_llm_stand_in
from tests.fakes.tiny_models import make_tiny_checkpoint
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.engines.base import EngineOptions, generate
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.trtllm.engine import TrtllmEngine
from trtllm_workers.engines.trtllm.failures import SUSPICIOUS_FAILURES
from trtllm_workers.errors import ConfigError, EngineDead, NotSupported
from trtllm_workers.types import (
    FinishReason,
    GenerateRequest,
    GuidedDecoding,
    GuidedKind,
    Prefilled,
    SamplingParams,
    TokenChunk,
)

KEYS: dict[str, Any] = {
    "max_batch_size": 8,
    "max_num_tokens": 64,
    "max_seq_len": 256,
    "enable_chunked_prefill": True,
    "enable_iter_perf_stats": True,
    "kv_cache_config.tokens_per_block": 8,
    "kv_cache_config.max_tokens": 2048,
}
NATIVE = {
    "cache_transceiver_config.backend": "UCX",
    "cache_transceiver_config.kv_transfer_timeout_ms": 5000,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "1")
    monkeypatch.setenv("FAKE_TRTLLM_TRANSPORT", "tcp")
    with tensorrt_llm_stand_in():
        yield


def build(model: Path, extra: dict[str, str] | None = None, **keys: Any) -> TrtllmEngine:
    given = {**KEYS, **{key.replace("__", "."): value for key, value in keys.items()}}
    config = EngineConfig("trtllm", {key: Setting(one, "test") for key, one in given.items()})
    engine = build_engine("trtllm", EngineOptions(model, config, extra=extra or {}))
    assert isinstance(engine, TrtllmEngine)
    return engine


@asynccontextmanager
async def started(
    model: Path, extra: dict[str, str] | None = None, **keys: Any
) -> AsyncIterator[TrtllmEngine]:
    engine = build(model, extra, **keys)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request(number: int = 0, **fields: Any) -> GenerateRequest:
    own = {name: fields.pop(name) for name in ("lora", "cache_salt") if name in fields}
    sampling = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, **fields}
    return GenerateRequest(
        request_id=f"r{number}",
        prompt_token_ids=[5, 6, 7, 8, 9],
        sampling=SamplingParams(**sampling),
        **own,
    )


async def last_of(engine: TrtllmEngine, asked: GenerateRequest) -> TokenChunk:
    async for chunk in generate(engine, asked):
        last = chunk
    return last


def fake(engine: TrtllmEngine) -> Any:
    return engine._llm.fake


def error_class() -> Callable[[str], Exception]:
    from tensorrt_llm.executor.utils import RequestError

    made: Callable[[str], Exception] = RequestError
    return made


async def test_adapters_salts_and_guides_reach_tensorrt_llm(model: Path) -> None:
    extra = {"loras": '{"french": "/adapters/french"}'}
    keys = {"enable_lora": True, "guided_decoding_backend": "xgrammar"}
    async with started(model, extra, **keys) as engine:
        guided = GuidedDecoding(GuidedKind.REGEX, "[ab]+")
        asked = request(lora="french", cache_salt="tenant-1", guided=guided)
        await last_of(engine, asked)
        seen = fake(engine).seen[-1]
        assert seen["lora"].lora_name == "french"
        assert (seen["lora"].lora_int_id, seen["lora"].lora_path) == (1, "/adapters/french")
        assert seen["cache_salt"] == "tenant-1"
        assert seen["sampling"].guided_decoding.regex == "[ab]+"
        assert seen["streaming"] is True


async def test_an_adapter_that_is_not_there_is_refused(model: Path) -> None:
    async with started(model) as engine:
        with pytest.raises(NotSupported, match="no adapter 'french'; it holds none"):
            engine.submit(request(lora="french"), lambda _chunk: None)
        with pytest.raises(NotSupported, match="guided"):
            engine.submit(
                request(guided=GuidedDecoding(GuidedKind.JSON_OBJECT)), lambda _chunk: None
            )


async def test_a_prefill_changes_nothing_of_the_request(model: Path) -> None:
    """TensorRT-LLM sets max_tokens to 1 in the object it is given."""
    async with started(model, {"role": "prefill"}, **_dotted(NATIVE)) as engine:
        asked = request(max_tokens=30)
        made: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        engine.prefill(asked, made.set_result)
        prefilled = await made
        assert prefilled.first.finish_reason is None
        assert asked.sampling.max_tokens == 30
        seen = fake(engine).seen[-1]
        assert seen["sampling"].max_tokens == 1
        assert seen["streaming"] is False
        assert prefilled.hold_s == 5.0


async def test_a_wrong_key_is_refused_at_the_start(model: Path) -> None:
    engine = build(model, no_such_key=1)
    with pytest.raises(ConfigError, match=r"refuses the engine config.*no_such_key"):
        await engine.start()
    await engine.close()


async def test_too_few_gpus_are_told_at_the_start(model: Path) -> None:
    engine = build(model, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="Only 1 GPUs are available, but 4 are required"):
        await engine.start()
    await engine.close()


async def test_speculation_goes_through_tensorrt_llm_s_own_merge(model: Path) -> None:
    """LLM() itself does not take the section as a mapping."""
    async with started(model, speculative_config__decoding_type="MTP") as engine:
        assert engine._llm.args["speculative_config"].decoding_type == "MTP"
        with pytest.raises(ValueError, match="Extra inputs"):
            type(engine._llm)(model=str(model), speculative_config={"decoding_type": "MTP"})


async def test_one_failed_request_is_that_request_s(model: Path) -> None:
    async with started(model) as engine:
        fake(engine).fail_next_request(error_class()("the prompt is odd"))
        failed = await last_of(engine, request(1))
        assert (failed.finish_reason, failed.error_code) == (FinishReason.ERROR, "engine_error")
        assert "the prompt is odd" in (failed.error_message or "")
        assert (await last_of(engine, request(2))).finish_reason is FinishReason.LENGTH


async def test_a_request_error_that_tells_of_the_process_ends_the_engine(model: Path) -> None:
    async with started(model) as engine:
        fake(engine).fail_next_request(error_class()("CUDA error: out of luck"))
        assert (await last_of(engine, request(1))).error_code == "engine_dead"
        async with asyncio.timeout(5):
            assert "CUDA error" in str(await engine.died())
        with pytest.raises(EngineDead):
            engine.submit(request(2), lambda _chunk: None)


async def test_failures_in_a_row_are_looked_into_by_a_request_of_our_own(model: Path) -> None:
    async with started(model) as engine:
        for number in range(SUSPICIOUS_FAILURES):
            fake(engine).fail_next_request(error_class()("odd"))
            await last_of(engine, request(number))
        assert (await last_of(engine, request(99))).finish_reason is FinishReason.LENGTH
        for _number in range(SUSPICIOUS_FAILURES + 1):  # the last one is the probe's
            fake(engine).fail_next_request(error_class()("odd"))
        for number in range(SUSPICIOUS_FAILURES):
            await last_of(engine, request(number))
        async with asyncio.timeout(5):
            assert "every request fails" in str(await engine.died())


async def test_an_exception_of_another_kind_ends_the_engine(model: Path) -> None:
    async with started(model) as engine:
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()
        engine.submit(request(1, max_tokens=200), chunks.put_nowait)
        await chunks.get()
        engine._llm.die(RuntimeError("executor loop ended"))
        async with asyncio.timeout(5):
            assert "executor loop ended" in str(await engine.died())
            while (chunk := await chunks.get()).finish_reason is None:
                pass
        assert chunk.error_code == "engine_dead"


@pytest.mark.parametrize("marker", ["NixlTransferAgent", "UcxConnectionManager"])
async def test_the_log_decides_which_transport_is_used(
    model: Path, tmp_path: Path, marker: str
) -> None:
    log = tmp_path / "worker.log"
    log.write_text(f"[TensorRT-LLM][INFO] {marker} is up\n")
    engine = build(model, {"role": "decode", "log": str(log)}, **_dotted(NATIVE))
    if marker.startswith("Ucx"):
        assert (await engine.start()).kv_wire == "UCX"
    else:
        with pytest.raises(ConfigError, match="moved by UCX, but TensorRT-LLM's log says NIXL"):
            await engine.start()
    await engine.close()


def _dotted(keys: dict[str, Any]) -> dict[str, Any]:
    return {key.replace(".", "__"): value for key, value in keys.items()}

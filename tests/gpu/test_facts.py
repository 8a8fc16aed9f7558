"""What our notes believe of TensorRT-LLM without having seen it. Each test says which module relies on it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import SMALL
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.trtllm.api import load_api
from trtllm_workers.engines.trtllm.engine import TrtllmEngine
from trtllm_workers.types import GenerateRequest, KvEventKind, SamplingParams

PROMPT = list(range(1000, 1070))


def sampling(**more: Any) -> Any:
    api = load_api()
    fields = {"max_tokens": 16, "end_id": -1, "pad_id": 0, "top_k": 1, "detokenize": False, **more}
    return api.sampling_params(**fields)


async def last_of(result: Any) -> Any:
    async for output in result:
        last = output
    return last.outputs[0]


async def test_an_end_id_that_no_token_has_disables_the_end(engine: TrtllmEngine) -> None:
    """engines/trtllm/sampling.py gives -1 to models without an eos."""
    output = await last_of(engine._llm.generate_async(PROMPT, sampling(), streaming=True))
    assert (len(output.token_ids), output.finish_reason) == (16, "length")


async def test_iteration_gives_one_object_with_all_tokens_so_far(engine: TrtllmEngine) -> None:
    """engines/trtllm/chunks.py takes what is new from it."""
    seen, lengths = set(), []
    async for output in engine._llm.generate_async(PROMPT, sampling(), streaming=True):
        seen.add(id(output))
        lengths.append(len(output.outputs[0].token_ids))
    assert len(seen) == 1
    assert lengths == sorted(lengths)
    assert lengths[-1] == 16


async def test_a_stop_token_is_listed_or_not(engine: TrtllmEngine) -> None:
    """engines/trtllm/chunks.py hides it in both cases, and counts it."""
    free = await last_of(engine._llm.generate_async(PROMPT, sampling(), streaming=True))
    stop = free.token_ids[5]
    first = free.token_ids.index(stop)
    for name, more in (("end_id", {"end_id": stop}), ("stop id", {"stop_token_ids": [stop]})):
        output = await last_of(engine._llm.generate_async(PROMPT, sampling(**more), streaming=True))
        assert output.finish_reason == "stop"
        listed = list(output.token_ids) == free.token_ids[: first + 1]
        assert listed or list(output.token_ids) == free.token_ids[:first]
        print(f"{name}: listed {listed}, stop_reason {output.stop_reason!r}")  # noqa: T201


async def test_abort_brings_a_last_response(engine: TrtllmEngine) -> None:
    """engines/trtllm/streams.py waits for it."""
    result = engine._llm.generate_async(PROMPT, sampling(max_tokens=2000), streaming=True)
    count = 0
    async with asyncio.timeout(60):
        async for output in result:
            count += 1
            if count == 3:
                result.abort()
            last = output.outputs[0]
    assert last.finish_reason == "cancelled"


async def test_logprobs_are_mappings_by_token(engine: TrtllmEngine) -> None:
    """engines/trtllm/chunks.py reads them."""
    output = await last_of(
        engine._llm.generate_async(PROMPT, sampling(max_tokens=4, logprobs=3), streaming=True)
    )
    assert len(output.logprobs) == 4
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        assert entry[token].logprob <= 0.0


async def test_events_and_statistics_come(engine: TrtllmEngine) -> None:
    """engines/trtllm/kv_index.py and books.py live on them."""
    done = asyncio.Event()
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
    )
    engine.submit(request, lambda chunk: done.set() if chunk.finish_reason else None)
    stored = 0
    async with asyncio.timeout(60):
        await done.wait()
        async for event in engine.kv_events():
            stored += len(event.block_hashes) if event.kind is KvEventKind.STORED else 0
            if stored >= len(PROMPT) // 32:
                break
    assert engine.stats().num_steps > 0
    assert engine.stats().total_blocks > 0


@pytest.mark.parametrize("salt", ["", "salt"])
async def test_a_salt_is_taken(engine: TrtllmEngine, salt: str) -> None:
    more = {"cache_salt": salt} if salt else {}
    output = await last_of(
        engine._llm.generate_async(PROMPT, sampling(max_tokens=2), streaming=True, **more)
    )
    assert len(output.token_ids) == 2


async def test_decode_s_output_repeats_the_first_token_or_not(model: Path) -> None:
    """engines/trtllm/chunks.py takes both; one instance plays both roles here."""
    keys = {
        **SMALL,
        "disable_overlap_scheduler": True,
        "cache_transceiver_config.backend": "UCX",
        "cache_transceiver_config.max_tokens_in_buffer": 4096,
        "cache_transceiver_config.kv_transfer_timeout_ms": 60000,
    }
    config = EngineConfig("trtllm", {key: Setting(value, "test") for key, value in keys.items()})
    engine = build_engine("trtllm", EngineOptions(model, config, extra={"role": "decode"}))
    assert isinstance(engine, TrtllmEngine)
    await engine.start()
    api = load_api()
    whole = await last_of(engine._llm.generate_async(PROMPT, sampling(), streaming=True))
    asked = api.disaggregated_params(request_type="context_only")
    made = await engine._llm.generate_async(PROMPT, sampling(), disaggregated_params=asked)
    output = made.outputs[0]
    assert output.finish_reason in ("length", "not_finished")
    params = output.disaggregated_params
    assert list(params.first_gen_tokens) == whole.token_ids[:1]
    params.request_type = "generation_only"
    rest = await last_of(
        engine._llm.generate_async(PROMPT, sampling(), streaming=True, disaggregated_params=params)
    )
    repeats = list(rest.token_ids) == list(whole.token_ids)
    assert repeats or list(rest.token_ids) == list(whole.token_ids)[1:]
    print(f"context ends with {output.finish_reason}; decode repeats the first token: {repeats}")  # noqa: T201
    await engine.close()

"""The stand-in for TensorRT-LLM behaves as the real one is known to, traps included."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.stand_in import tensorrt_llm_stand_in
from tests.fakes.tiny_models import make_tiny_checkpoint

PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "2")
    monkeypatch.setenv("FAKE_TRTLLM_TRANSPORT", "tcp")
    with tensorrt_llm_stand_in():
        yield


@asynccontextmanager
async def llm(model: Path, **more: Any) -> AsyncIterator[Any]:
    from tensorrt_llm.llmapi import LLM

    keys = {
        "max_num_tokens": 64,
        "max_batch_size": 8,
        "kv_cache_config": {"tokens_per_block": 8, "max_tokens": 2048, "event_buffer_max_size": 64},
        "enable_iter_perf_stats": True,
        **more,
    }
    made = await asyncio.to_thread(lambda: LLM(str(model), skip_tokenizer_init=True, **keys))
    try:
        yield made
    finally:
        await asyncio.to_thread(made.shutdown)


def sampling(**more: Any) -> Any:
    from tensorrt_llm.llmapi import SamplingParams

    return SamplingParams(**{"max_tokens": 6, "end_id": -1, "pad_id": 0, **more})


def params(**fields: Any) -> Any:
    from tensorrt_llm.llmapi import DisaggregatedParams

    return DisaggregatedParams(**fields)


async def tokens_of(result: Any) -> list[int]:
    async for output in result:
        last = output
    return list(last.outputs[0].token_ids)


def test_the_version_is_found_without_an_import() -> None:
    assert importlib.metadata.version("tensorrt-llm") == "1.2.1"


async def test_a_result_is_one_object_that_grows(model: Path) -> None:
    async with llm(model) as made:
        result = made.generate_async(PROMPT, sampling(), streaming=True)
        assert not asyncio.iscoroutine(result)
        seen = [(id(one), len(one.outputs[0].token_ids)) async for one in result]
        assert len({identity for identity, _ in seen}) == 1
        assert [length for _, length in seen] == [1, 2, 3, 4, 5, 6]
        assert result.outputs[0].finish_reason == "length"


async def test_several_tokens_may_come_at_once(model: Path) -> None:
    async with llm(model, stream_interval=4) as made:
        result = made.generate_async(PROMPT, sampling(), streaming=True)
        assert [len(one.outputs[0].token_ids) async for one in result] == [4, 6]


async def test_unset_sampling_is_greedy(model: Path) -> None:
    async with llm(model) as made:
        greedy = await tokens_of(made.generate_async(PROMPT, sampling(top_k=1), streaming=True))
        assert await tokens_of(made.generate_async(PROMPT, sampling(), streaming=True)) == greedy


async def test_an_end_id_is_listed_and_a_stop_id_is_not(model: Path) -> None:
    async with llm(model) as made:
        free = await tokens_of(made.generate_async(PROMPT, sampling(), streaming=True))
        at = free.index(free[3])
        ended = made.generate_async(PROMPT, sampling(end_id=free[3]), streaming=True)
        assert await tokens_of(ended) == free[: at + 1]
        assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
        stopped = made.generate_async(PROMPT, sampling(stop_token_ids=[free[3]]), streaming=True)
        assert await tokens_of(stopped) == free[:at]
        assert stopped.outputs[0].stop_reason == free[3]


async def test_what_is_wrong_with_a_request_is_raised_at_once(model: Path) -> None:
    async with llm(model) as made:
        with pytest.raises(ValueError, match="end_id"):
            made.generate_async(PROMPT, sampling(end_id=None))
        with pytest.raises(ValueError, match="larger than max_num_tokens"):
            made.generate_async(PROMPT * 5, sampling())
        # A generation phase brings its KV along.
        given = params(request_type="GENERATION_ONLY", opaque_state=b"x", first_gen_tokens=[1])
        assert made.generate_async(PROMPT * 5, sampling(), disaggregated_params=given)
        with pytest.raises(ValueError, match="Unknown request type"):
            params(request_type="prefill")
        with pytest.raises(TypeError):
            params(disagg_request_id=1)  # 1.3 has it


async def test_the_context_phase_sets_max_tokens_in_place_and_is_not_finished(model: Path) -> None:
    async with llm(model, cache_transceiver_config={"backend": "UCX"}) as made:
        asked = sampling()
        result = made.generate_async(
            PROMPT, asked, disaggregated_params=params(request_type="context_only")
        )
        assert asked.max_tokens == 1
        output = (await result).outputs[0]
        assert output.finish_reason == "not_finished"
        assert output.disaggregated_params.first_gen_tokens == output.token_ids
        assert isinstance(output.disaggregated_params.opaque_state, bytes)


async def test_the_generation_phase_repeats_the_first_token_and_gives_the_same(model: Path) -> None:
    config = {"backend": "NIXL", "kv_transfer_timeout_ms": 5000}
    async with (
        llm(model, cache_transceiver_config=config) as context,
        llm(model, cache_transceiver_config=config) as generation,
    ):
        whole = await tokens_of(context.generate_async(PROMPT, sampling(), streaming=True))
        given = params(request_type="context_only")
        made = await context.generate_async(PROMPT, sampling(), disaggregated_params=given)
        state = made.outputs[0].disaggregated_params
        state.request_type = "generation_only"
        result = generation.generate_async(
            PROMPT, sampling(), streaming=True, disaggregated_params=state
        )
        assert await tokens_of(result) == whole


async def test_without_a_transceiver_a_phase_fails_alone(model: Path) -> None:
    from tensorrt_llm.executor.utils import RequestError

    async with llm(model) as made:
        given = params(request_type="context_only")
        with pytest.raises(RequestError, match="backend is not set"):
            await made.generate_async(PROMPT, sampling(), disaggregated_params=given)
        assert await tokens_of(made.generate_async(PROMPT, sampling(), streaming=True))


@pytest.mark.parametrize(
    ("backend", "environ", "marker"),
    [
        ("UCX", {}, "UcxConnectionManager"),
        ("UCX", {"TRTLLM_USE_NIXL_KVCACHE": "1"}, "UcxConnectionManager"),
        ("DEFAULT", {}, "NixlTransferAgent"),
        ("DEFAULT", {"TRTLLM_USE_UCX_KVCACHE": "1"}, "UcxConnectionManager"),
    ],
)
async def test_the_log_tells_the_transceiver(
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    environ: dict[str, str],
    marker: str,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    async with llm(model, cache_transceiver_config={"backend": backend}):
        assert marker in capsys.readouterr().out


async def test_events_begin_with_a_prompt_end_and_are_armed_again(model: Path) -> None:
    async with llm(model) as made:
        with pytest.raises(AssertionError):
            made.get_kv_cache_events_async(0.05)
        await tokens_of(made.generate_async(PROMPT, sampling(), streaming=True))
        first = [event async for event in made.get_kv_cache_events_async(0.2)]
        assert [event["event_id"] for event in first] == list(range(len(first)))
        assert first[0]["data"]["type"] == "created"
        stored = [event["data"] for event in first if event["data"]["type"] == "stored"]
        assert [len(block["tokens"]) for block in stored[0]["blocks"]] == [8, 8]
        assert [event async for event in made.get_kv_cache_events_async(0.2)] == []
        await tokens_of(made.generate_async(PROMPT[::-1], sampling(), streaming=True))
        assert [event async for event in made.get_kv_cache_events_async(0.2)]


async def test_abort_is_answered_and_one_in_a_transfer_is_torn(model: Path) -> None:
    async with llm(model, cache_transceiver_config={"backend": "UCX"}) as made:
        result = made.generate_async(PROMPT, sampling(max_tokens=200), streaming=True)
        async for _ in result:
            if not result.aborted():
                result.abort()
        assert result.outputs[0].finish_reason == "cancelled"
        context = await made.generate_async(
            PROMPT, sampling(), disaggregated_params=params(request_type="context_only")
        )
        state = context.outputs[0].disaggregated_params
        state.request_type = "generation_only"
        result = made.generate_async(PROMPT, sampling(), disaggregated_params=state)
        result.abort()
        await result
        assert made.fake.torn == 1


def test_arguments_are_strict_and_gpus_are_counted(model: Path) -> None:
    from tensorrt_llm.llmapi import LLM

    for wrong in ({"max_batchsize": 1}, {"kv_cache_config": {"max_token": 1}}):
        with pytest.raises(ValueError, match="LLM got invalid argument"):
            LLM(str(model), **wrong)
    with pytest.raises(ValueError, match="backend"):
        LLM(str(model), cache_transceiver_config={"backend": "ucx"})
    with pytest.raises(RuntimeError, match="Only 2 GPUs"):
        LLM(str(model), tensor_parallel_size=4)


def test_spawning_ranks_fails_inside_a_job(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorrt_llm.llmapi import LLM

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(RuntimeError, match="already filled"):
        LLM(str(model), tensor_parallel_size=2)


def test_only_one_section_is_merged_key_by_key(tmp_path: Path) -> None:
    from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_options

    path = tmp_path / "a.yaml"
    path.write_text("kv_cache_config: {dtype: fp8}\nmoe_config: {backend: TRITON}\n")
    args = {"kv_cache_config": {"max_tokens": 8}, "moe_config": {"max_num_tokens": 4}}
    merged = update_llm_args_with_extra_options(args, str(path))
    assert merged["kv_cache_config"] == {"max_tokens": 8, "dtype": "fp8"}
    assert merged["moe_config"] == {"backend": "TRITON"}

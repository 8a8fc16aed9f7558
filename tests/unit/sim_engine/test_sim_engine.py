"""What only the simulator promises: pace, costs, rehearsed death. The contract suite has the rest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.virtual_clock import VirtualClockLoop, run_virtual
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.sim.settings import KEYS
from trtllm_workers.errors import ConfigError, ContextTooLong, EngineDead, NotSupported
from trtllm_workers.types import FinishReason, GenerateRequest, SamplingParams, TokenChunk

TEN_MS = {"decode": {"base_ms": 10}}


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"vocab_size": 1024, "max_position_embeddings": 4096, "eos_token_id": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def engine_of(model_path: Path, cost: dict[str, Any], **settings: Any) -> Engine:
    path = model_path.parent / "cost.yaml"
    path.write_text(json.dumps(cost))
    config = default_config("sim", KEYS, **settings)
    return build_engine("sim", EngineOptions(model_path, config, extra={"cost_path": str(path)}))


@asynccontextmanager
async def running(model_path: Path, cost: dict[str, Any], **settings: Any) -> AsyncIterator[Engine]:
    engine = engine_of(model_path, cost, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


class Timed:
    """One answer and when each chunk came, in seconds since it was asked for."""

    def __init__(self, engine: Engine, prompt: list[int], max_tokens: int, **sampling: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.chunks: list[TokenChunk] = []
        self.times_s: list[float] = []
        self.ended = asyncio.Event()
        self.on_chunk: Callable[[], None] = lambda: None
        self.asked_s = self.loop.time()
        fields = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})
        request = GenerateRequest(
            request_id=f"r{id(self)}", prompt_token_ids=prompt, sampling=fields
        )
        engine.submit(request, self._deliver)

    def _deliver(self, chunk: TokenChunk) -> None:
        self.chunks.append(chunk)
        self.times_s.append(self.loop.time() - self.asked_s)
        if chunk.finish_reason is not None:
            self.ended.set()
        self.on_chunk()

    async def end(self) -> Timed:
        await self.ended.wait()
        return self

    @property
    def gaps_ms(self) -> list[float]:
        return [
            (after - before) * 1e3
            for before, after in zip(self.times_s, self.times_s[1:], strict=False)
        ]


def virtual(main: Callable[[VirtualClockLoop], Awaitable[None]]) -> None:
    """Run ``main`` on a virtual clock."""

    async def with_loop() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualClockLoop)
        await main(loop)

    run_virtual(with_loop())


def test_ten_milliseconds_a_step_means_exactly_that(model_path: Path) -> None:
    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, TEN_MS) as engine:
            many = [Timed(engine, [5 + i] * 200, 100) for i in range(40)]
            for answer in many:
                await answer.end()
                assert answer.times_s[0] == 0  # prefill is free
                assert answer.times_s == pytest.approx([i / 100 for i in range(100)])

    virtual(main)


def test_small_delays_do_not_add_up(model_path: Path) -> None:
    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, TEN_MS) as engine:
            answer = Timed(engine, [5], 101)
            answer.on_chunk = lambda: loop.spend(0.003)  # the consumer takes 3 ms of every 10
            await answer.end()
            assert answer.times_s[100] == pytest.approx(1.0, abs=0.004)

    virtual(main)


def test_after_a_long_delay_steps_come_back_to_schedule_without_a_burst(model_path: Path) -> None:
    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, TEN_MS) as engine:
            answer = Timed(engine, [5], 60)
            answer.on_chunk = lambda: loop.spend(0.035) if len(answer.chunks) == 10 else None
            await answer.end()
            gaps = answer.gaps_ms
            assert gaps[9] == pytest.approx(40)  # planned 25 ms late, and half a step
            assert gaps[10:16] == pytest.approx([5] * 6)
            assert gaps[16:] == pytest.approx([10] * len(gaps[16:]))
            assert answer.times_s[-1] == pytest.approx(0.59)

    virtual(main)


def test_after_standing_still_for_long_the_schedule_begins_anew(model_path: Path) -> None:
    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, TEN_MS) as engine:
            answer = Timed(engine, [5], 500)
            answer.on_chunk = lambda: loop.spend(3600.0) if len(answer.chunks) == 10 else None
            await answer.end()
            # One second at most is made up, at half a step's time per step: 200 steps.
            assert answer.gaps_ms[10:209] == pytest.approx([5] * 199)
            assert answer.gaps_ms[211:] == pytest.approx([10] * len(answer.gaps_ms[211:]))

    virtual(main)


def test_prefill_costs_its_uncached_tokens_in_chunks(model_path: Path) -> None:
    cost = {"prefill": {"base_ms": 1, "per_token_us": 10}}

    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, cost, max_num_tokens=100) as engine:
            first = await Timed(engine, [5] * 321, 1).end()
            assert first.times_s == pytest.approx([4 * 1e-3 + 321 * 1e-5])
            again = await Timed(engine, [5] * 321, 1).end()
            assert again.chunks[0].cached_tokens == 320
            assert again.times_s == pytest.approx([1e-3 + 1e-5])

    virtual(main)


def test_decode_costs_its_streams_and_what_they_hold(model_path: Path) -> None:
    cost = {"decode": {"base_ms": 1, "per_sequence_us": 100, "per_kv_token_ns": 1000}}

    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, cost) as engine:
            a, b = Timed(engine, [5] * 100, 2), Timed(engine, [6] * 50, 2)
            await a.end()
            await b.end()
            # Base, two streams, and the 100 + 50 prompt tokens with one made token each.
            assert a.gaps_ms == pytest.approx([1 + 2 * 0.1 + 152e-3])

    virtual(main)


def test_decoding_goes_on_while_a_long_prompt_is_prefilled(model_path: Path) -> None:
    cost = {"prefill": {"per_token_us": 1000}, "decode": {"base_ms": 1}}

    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, cost, max_num_tokens=21) as engine:
            decoding = Timed(engine, [5], 40)
            decoding.on_chunk = lambda: started.set()
            started = asyncio.Event()
            await started.wait()
            long = Timed(engine, [6] * 200, 1)
            await long.end()
            # 20 prompt tokens and one decoded token per step: ten steps, a token in each.
            assert len(long.times_s) == 1
            assert 11 <= len(decoding.chunks) <= 13
            await decoding.end()

    virtual(main)


def test_the_default_needs_no_file(model_path: Path) -> None:
    async def main(loop: VirtualClockLoop) -> None:
        config = default_config("sim", KEYS)
        engine = build_engine("sim", EngineOptions(model_path, config))
        await engine.start()
        answer = await Timed(engine, [5] * 100, 3).end()
        assert 5 < min(answer.gaps_ms) <= max(answer.gaps_ms) < 6
        await engine.close()

    virtual(main)


async def test_start_reports_progress_and_a_wrong_cost_file(model_path: Path) -> None:
    reports: list[float] = []
    config = default_config("sim", KEYS)
    engine = build_engine("sim", EngineOptions(model_path, config, on_progress=reports.append))
    await engine.start()
    assert reports == [1.0]
    await engine.close()
    broken = engine_of(model_path, {"decode": {"base": 1}})
    with pytest.raises(ConfigError, match=r"unknown key 'decode\.base'"):
        await broken.start()
    await broken.close()


async def test_max_seq_len_comes_from_the_model_unless_set(model_path: Path) -> None:
    for setting, expected in ((None, 4096), (100, 100), (100_000, 100_000)):
        engine = engine_of(model_path, {}, max_seq_len=setting)
        assert (await engine.start()).max_seq_len == expected
        await engine.close()


async def test_tokens_are_words_of_the_vocabulary(model_path: Path) -> None:
    async with running(model_path, {}) as engine:
        answer = await Timed(engine, [5], 500).end()
        tokens = [token for chunk in answer.chunks for token in chunk.token_ids]
        assert min(tokens) >= 261  # no special token, no single byte
        assert max(tokens) < 1024


async def test_fields_without_meaning_are_refused_with_a_remedy(model_path: Path) -> None:
    async with running(model_path, {}) as engine:
        with pytest.raises(NotSupported, match=r"does not honour 'logprobs'; leave it out"):
            Timed(engine, [5], 5, logprobs=0)


async def test_without_chunked_prefill_long_prompts_are_refused(model_path: Path) -> None:
    settings: dict[str, Any] = {
        "enable_chunked_prefill": False,
        "max_num_tokens": 64,
        "kv_cache_config__max_tokens": 256,
    }
    async with running(model_path, {}, **settings) as engine:
        with pytest.raises(ContextTooLong, match=r"65 prompt tokens do not fit .* 64"):
            Timed(engine, [5] * 65, 1)
        # Preemption makes streams longer than a step; they are taken up again all the same.
        answers = [Timed(engine, [5 + i] * 20, 150) for i in range(4)]
        for answer in answers:
            await answer.end()
            assert len(answer.chunks) == 150
        assert engine.stats().preemptions > 0


async def test_eos_probability_ends_answers_unless_ignored(model_path: Path) -> None:
    async with running(model_path, {"eos_probability": 0.2}) as engine:
        answers = [await Timed(engine, [5 + i], 400).end() for i in range(20)]
        assert {answer.chunks[-1].finish_reason for answer in answers} == {FinishReason.STOP}
        assert {answer.chunks[-1].stop_token_id for answer in answers} == {4}
        full = await Timed(engine, [5], 400, ignore_eos=True).end()
        assert len(full.chunks) == 400


async def test_die_after_steps_rehearses_a_death(model_path: Path) -> None:
    async with running(model_path, {"die_after_steps": 3}) as engine:
        answer = await Timed(engine, [5], 100).end()
        assert len(answer.chunks) == 4
        assert answer.chunks[-1].error_code == EngineDead.code
        assert "after 3 steps" in str(answer.chunks[-1].error_message)
        assert "after 3 steps" in str(await engine.died())
        with pytest.raises(EngineDead, match="died"):
            Timed(engine, [5], 1)


async def test_before_start_nothing_is_taken(model_path: Path) -> None:
    engine = engine_of(model_path, {})
    with pytest.raises(EngineDead, match="has not started"):
        Timed(engine, [5], 1)
    engine.abort("nobody")
    assert engine.stats().total_blocks == 0
    await engine.close()


async def test_a_consumer_that_raises_is_reported_and_its_stream_ends(model_path: Path) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, what: reported.append(what))
    async with running(model_path, {}) as engine:

        def broken() -> None:
            if len(answer.chunks) == 3:
                raise RuntimeError("broken")

        answer = Timed(engine, [5], 100)
        answer.on_chunk = broken
        await answer.end()
        assert answer.chunks[-1].finish_reason is FinishReason.ABORT
        assert len(answer.chunks) == 4
    assert [str(what["exception"]) for what in reported] == ["broken"]
    assert "its consumer raised" in reported[0]["message"]


def test_preemption_takes_the_youngest_so_the_oldest_is_never_delayed(model_path: Path) -> None:
    async def main(loop: VirtualClockLoop) -> None:
        async with running(model_path, TEN_MS, kv_cache_config__max_tokens=320) as engine:
            answers = [Timed(engine, [5 + i] * 20, 200) for i in range(6)]
            for answer in answers:
                await answer.end()
            assert engine.stats().preemptions > 0
            assert answers[0].gaps_ms == pytest.approx([10] * 199)
            ends = [answer.times_s[-1] for answer in answers]
            assert ends == sorted(ends)

    virtual(main)

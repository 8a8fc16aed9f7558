"""Handoffs of workers whose engine moves its own KV: the adapter on the stand-in for TensorRT-LLM."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes.queue import MemoryQueue, MemoryQueueHub
from tests.fakes.stand_in import tensorrt_llm_stand_in
from tests.unit.worker.cluster import ACK_WAIT_S, Cluster, cluster, prompt_of, request
from tests.unit.worker.queue_stage import works
from trtllm_workers.engines.trtllm.engine import TrtllmEngine
from trtllm_workers.engines.trtllm.handoff_state import encode_state
from trtllm_workers.planes.messages import (
    Fetched,
    Fetching,
    FillAsk,
    FillGrant,
    Message,
    Offer,
    PrefillAsk,
    Submit,
)
from trtllm_workers.types import FinishReason, GenerateRequest, Role

STRATEGIES = ["decode_first", "prefill_first"]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "1")
    monkeypatch.setenv("FAKE_TRTLLM_TRANSPORT", "tcp")
    monkeypatch.setenv("FAKE_TRTLLM_SEEDS", "1")
    with tensorrt_llm_stand_in():
        yield


@asynccontextmanager
async def both(tmp_path: Path, **options: Any) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "trtllm") as made:
        await made.add(Role.AGGREGATED, "a0")
        await made.add(Role.PREFILL, "p0", **options)
        await made.add(Role.DECODE, "d0", **options)
        await made.paired("d0", "p0")
        yield made


def send(made: Cluster, strategy: str, asked: GenerateRequest) -> int:
    if strategy == "decode_first":
        return made.submit(asked, "d0")
    return made.submit(asked, "p0", "d0")


def llm_of(made: Cluster, worker_id: str) -> Any:
    engine = made.nodes[worker_id].engine
    assert isinstance(engine, TrtllmEngine)
    return engine._llm


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_tokens_equal_those_of_an_aggregated_run(tmp_path: Path, strategy: str) -> None:
    async with both(tmp_path) as made:
        for _round in range(2):
            asked = [request(prompt_of(n, n)) for n in (1, 7, 8, 9, 64, 65, 200)]
            streams = [send(made, strategy, one) for one in asked]
            for stream, one in zip(streams, asked, strict=True):
                assert await made.answer(stream) == await made.expected(one, "a0")
        assert made.nodes["d0"].fallbacks() == {}
        assert made.nodes["p0"].ended()["released", "fetched"] == 2 * len(asked) + 1
        stats = made.client.stats["d0"].pairs[0]
        assert stats.transport == "engine-native"
        await made.idle()


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_sampled_tokens_and_logprobs_equal_those_of_an_aggregated_run(
    tmp_path: Path, strategy: str
) -> None:
    async with both(tmp_path) as made:
        asked = request(prompt_of(3, 40), temperature=0.9, seed=5, logprobs=2)
        assert await made.answer(send(made, strategy, asked)) == await made.expected(asked, "a0")


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_an_answer_of_one_token_is_no_handoff(tmp_path: Path, strategy: str) -> None:
    async with both(tmp_path) as made:
        asked = request(prompt_of(1, 30), max_tokens=1)
        assert await made.answer(send(made, strategy, asked)) == await made.expected(asked, "a0")
        assert made.nodes["p0"].service.meters.offered == 1  # the canary's alone
        await made.idle()


async def test_a_short_prompt_is_computed_by_decode(tmp_path: Path) -> None:
    async with both(tmp_path, max_local=20) as made:
        short, long = request(prompt_of(1, 20)), request(prompt_of(2, 21))
        assert await made.answer(made.submit(short, "d0")) == await made.expected(short, "a0")
        assert made.nodes["d0"].service.meters.local == 1
        assert await made.answer(made.submit(long, "d0")) == await made.expected(long, "a0")
        assert made.nodes["d0"].service.meters.local == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_kv_that_does_not_come_is_computed_by_decode(tmp_path: Path, strategy: str) -> None:
    async with both(tmp_path) as made:
        error = __import__("tensorrt_llm.executor.utils").executor.utils.RequestError
        llm_of(made, "d0").fake.fail_next_request(error("KV transfer failed: connection reset"))
        asked = request(prompt_of(4, 50))
        assert await made.answer(send(made, strategy, asked)) == await made.expected(asked, "a0")
        assert made.nodes["d0"].fallbacks() == {"transfer_failed": 1}
        await made.idle()


async def test_a_prefill_worker_without_the_adapter_is_not_asked(tmp_path: Path) -> None:
    """decode_first, and of two prefill workers only one has the adapter."""
    adapter = {"loras": '{"french": "/x"}'}
    async with cluster(tmp_path, "trtllm") as made:
        await made.add(Role.PREFILL, "p0")
        await made.add(Role.PREFILL, "p1", extra=adapter, enable_lora=True)
        await made.add(Role.DECODE, "d0", extra=adapter, enable_lora=True)
        for prefill in ("p0", "p1"):
            await made.paired("d0", prefill)
        for number in range(4):
            asked = msgspec.structs.replace(request(prompt_of(number, 40)), lora="french")
            assert await made.answer(made.submit(asked, "d0"))
        assert made.nodes["d0"].fallbacks() == {}
        assert made.nodes["p1"].ended()["released", "fetched"] == 4 + 1
        assert made.nodes["p0"].ended()["released", "fetched"] == 1  # the canary's


async def test_a_state_of_another_release_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with both(tmp_path) as made:
        monkeypatch.setattr(
            "trtllm_workers.engines.trtllm.prefill_result.encode_state",
            lambda params, _version: encode_state(params, "1.3.0"),
        )
        asked = request(prompt_of(5, 50))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")
        assert made.nodes["d0"].fallbacks() == {"transfer_failed": 1}


@pytest.mark.parametrize(
    ("strategy", "behind"),
    [
        ("decode_first", None),
        ("decode_first", PrefillAsk),
        ("decode_first", Offer),
        ("decode_first", Fetched),
        ("prefill_first", None),
        ("prefill_first", Submit),
        ("prefill_first", Offer),
        ("prefill_first", Fetched),
    ],
)
async def test_an_abort_in_any_phase_tears_no_transfer(
    tmp_path: Path, strategy: str, behind: type | None
) -> None:
    async with both(tmp_path) as made:
        sent: list[int] = []

        def hook(message: Message) -> None:
            if behind is not None and isinstance(message, behind) and sent:
                made.abort(sent[0], "p0", "d0")

        made.after_message = hook
        sent.append(send(made, strategy, request(prompt_of(3, 90), max_tokens=300)))
        if behind is None:
            made.abort(sent[0], "p0", "d0")
        await made.client.until(lambda: sent[0] in made.client.last)
        assert made.client.last[sent[0]].finish_reason is FinishReason.ABORT
        await made.idle()
        assert llm_of(made, "d0").fake.torn == 0


async def test_aborts_at_random_moments_leave_nothing_behind(tmp_path: Path) -> None:
    dice = random.Random(20261121)
    async with both(tmp_path) as made:
        flying: list[int] = []
        for _ in range(300):
            while len(flying) < 16:
                asked = request(prompt_of(dice.randrange(40), dice.randrange(1, 250)), 40)
                flying.append(send(made, dice.choice(STRATEGIES), asked))
            if dice.random() < 0.5:
                await made.client.happened()
            made.abort(flying.pop(dice.randrange(len(flying))), "p0", "d0")
        for stream in flying:
            made.abort(stream, "p0", "d0")
        await made.idle()
        for node in made.nodes.values():
            assert node.held_blocks == 0
            assert node.service.meters.leaked_blocks == 0
        assert llm_of(made, "d0").fake.torn == 0
        asked = request(prompt_of(99, 100))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")


async def test_an_engine_that_breaks_ends_its_streams_and_says_so(tmp_path: Path) -> None:
    async with cluster(tmp_path, "trtllm") as made:
        node = await made.add(Role.AGGREGATED, "a0")
        running = made.submit(request(prompt_of(1, 20), max_tokens=400), "a0")
        await made.client.until(lambda: made.client.tokens.get(running))
        made.submit(request(prompt_of(2, 20), seed=666001, temperature=0.5), "a0")
        async with asyncio.timeout(10):
            died = await node.engine.died()
        assert "illegal memory access" in str(died)
        await made.client.until(lambda: running in made.client.last)
        assert made.client.last[running].error_code == "engine_dead"


async def test_a_request_that_fails_touches_no_other(tmp_path: Path) -> None:
    async with cluster(tmp_path, "trtllm") as made:
        await made.add(Role.AGGREGATED, "a0")
        asked = request(prompt_of(1, 20), max_tokens=60)
        good = made.submit(asked, "a0")
        bad = made.submit(request(prompt_of(2, 20), seed=666003, temperature=0.5), "a0")
        await made.client.until(lambda: bad in made.client.last)
        assert made.client.last[bad].error_code == "engine_error"
        assert "made to fail" in (made.client.last[bad].error_message or "")
        assert await made.answer(good) == await made.expected(asked, "a0")


@asynccontextmanager
async def queued(tmp_path: Path, *prefills: str) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, "trtllm") as made:
        hub = MemoryQueueHub(ack_wait_s=ACK_WAIT_S)
        await made.add(Role.AGGREGATED, "a0")
        for name in prefills:
            await made.add(Role.PREFILL, name, queue=MemoryQueue(hub))
        await made.add(Role.DECODE, "d0", queue=MemoryQueue(hub))
        for name in prefills:
            await made.paired("d0", name)
        yield made
        await made.idle()
        async with asyncio.timeout(10):
            while hub.kept:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.01)


async def test_with_a_prefill_queue_the_tokens_are_the_same(tmp_path: Path) -> None:
    async with queued(tmp_path, "p0", "p1") as made:
        asked = [request(prompt_of(n, n)) for n in (1, 7, 8, 9, 64, 65, 200)]
        for _round in range(2):
            streams = [made.submit(one, "d0") for one in asked]
            for stream, one in zip(streams, asked, strict=True):
                assert await made.answer(stream) == await made.expected(one, "a0")
        decode = made.nodes["d0"]
        assert decode.fallbacks() == {}
        assert dict(decode.service.meters.counts().queue_jobs) == {"granted": 14}


@pytest.mark.parametrize("behind", [FillAsk, FillGrant, Offer, Fetching, Fetched])
async def test_a_job_of_a_prefill_worker_that_is_lost_costs_no_answer(
    tmp_path: Path, behind: type[Message]
) -> None:
    async with queued(tmp_path, "p0", "p1") as made:
        asked = request(prompt_of(3, 90))
        expected = await made.expected(asked, "a0")
        killed: list[asyncio.Task[None]] = []

        def hook(message: Message) -> None:
            busy = [name for name in ("p0", "p1") if works(made, name)]
            if isinstance(message, behind) and busy and not killed:
                killed.append(asyncio.create_task(made.kill(busy[0])))

        made.after_message = hook
        assert await made.answer(made.submit(asked, "d0")) == expected
        await asyncio.gather(*killed)
        assert killed, "nobody was lost"


@pytest.mark.parametrize("behind", [None, FillGrant, Offer])
async def test_an_abort_of_a_queued_request_leaves_nothing(
    tmp_path: Path, behind: type[Message] | None
) -> None:
    async with queued(tmp_path, "p0") as made:
        sent: list[int] = []

        def hook(message: Message) -> None:
            if behind is not None and isinstance(message, behind) and sent:
                made.abort(sent[0], "d0")

        made.after_message = hook
        sent.append(made.submit(request(prompt_of(3, 90), max_tokens=400), "d0"))
        if behind is None:
            made.abort(sent[0], "d0")
        await made.client.until(lambda: sent[0] in made.client.last)
        assert made.client.last[sent[0]].finish_reason is FinishReason.ABORT

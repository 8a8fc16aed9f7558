"""The watchdog: what counts as life, when a probe is sent, and when an engine is taken for dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tests.unit.worker.cluster import cluster
from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import EngineDead
from trtllm_workers.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    Role,
    TokenChunk,
)
from trtllm_workers.worker.watchdog import Watchdog

INFO = EngineInfo(
    engine="scripted",
    model_path="/m",
    model_id="m",
    block_size=16,
    num_blocks=100,
    max_seq_len=512,
    max_batch_size=4,
    max_num_tokens=512,
    vocab_size=500,
)


@dataclass
class Scripted:
    """An engine that answers when it is told to."""

    num_steps: int = 0
    pinned_blocks: int = 0
    asked: list[tuple[GenerateRequest, Callable[[TokenChunk], None]]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    refuses: EngineDead | None = None

    def submit(self, request: GenerateRequest, deliver: Callable[[TokenChunk], None]) -> None:
        if self.refuses is not None:
            raise self.refuses
        self.asked.append((request, deliver))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps=self.num_steps, num_running=3, pinned_blocks=self.pinned_blocks
        )


class Bench:
    def __init__(self, timeout_s: float = 100.0) -> None:
        self.engine = Scripted()
        self.now_s = 0.0
        self.delivered = 0
        self.dog = Watchdog(
            "w",
            cast("Engine", self.engine),
            INFO,
            lambda: self.delivered,
            timeout_s=timeout_s,
            clock=lambda: self.now_s,
        )
        self.dog.check()

    def after(self, seconds: float) -> EngineDead | None:
        """Look every second, as a worker does."""
        dead = None
        for _ in range(round(seconds)):
            self.now_s += 1.0
            dead = dead or self.dog.check()
        return dead


def test_a_silent_engine_is_asked_and_then_taken_for_dead() -> None:
    bench = Bench()
    assert bench.after(49) is None
    assert not bench.engine.asked
    assert bench.after(1) is None
    (request, _deliver) = bench.engine.asked[0]
    assert request.sampling.max_tokens == 1
    assert bench.dog.request_ids == {request.request_id}
    assert bench.after(99) is None
    dead = bench.after(1)
    assert dead is not None
    assert "not one token for 150 s" in str(dead)
    assert "3 requests open" in str(dead)


def test_a_worker_that_was_stopped_does_not_blame_its_engine() -> None:
    bench = Bench()
    bench.after(60)
    bench.now_s += 1e6  # the process slept, with the probe on its way
    assert bench.dog.check() is None
    assert bench.after(80) is None


def test_a_probe_that_is_answered_begins_the_wait_anew() -> None:
    bench = Bench()
    bench.after(50)
    request, deliver = bench.engine.asked[0]
    deliver(TokenChunk((1,), FinishReason.LENGTH))
    assert bench.dog.request_ids == set()
    assert bench.after(49) is None
    assert len(bench.engine.asked) == 1
    bench.after(2)
    assert len(bench.engine.asked) == 2
    assert bench.engine.asked[1][0].request_id != request.request_id


def test_a_probe_that_fails_is_an_answer_too() -> None:
    bench = Bench()
    bench.after(50)
    bench.engine.asked[0][1](TokenChunk((), FinishReason.ERROR, error_code="engine_error"))
    assert bench.after(60) is None


def test_what_is_delivered_to_others_is_life() -> None:
    bench = Bench()
    for _ in range(20):
        bench.delivered += 1
        assert bench.after(40) is None
    assert not bench.engine.asked


def test_a_long_prompt_that_computes_is_life() -> None:
    bench = Bench()
    bench.after(50)  # the probe waits behind the prompt
    for _ in range(20):
        bench.engine.num_steps += 1
        assert bench.after(40) is None


def test_blocks_that_wait_for_others_are_life_while_they_change() -> None:
    bench = Bench()
    bench.after(50)
    for _ in range(8):
        bench.engine.pinned_blocks += 1
        assert bench.after(90) is None


def test_steps_that_bring_nothing_are_no_life_for_ever() -> None:
    bench = Bench()
    dead = None
    for _ in range(30):
        bench.engine.num_steps += 1
        dead = dead or bench.after(40)
    assert dead is not None
    assert "not one token for 1000 s" in str(dead)


def test_an_engine_that_refuses_is_not_wedged() -> None:
    bench = Bench()
    bench.engine.refuses = EngineDead("closing")
    for _ in range(5):
        assert bench.after(60) is None


def test_without_a_limit_nothing_is_asked() -> None:
    bench = Bench(timeout_s=0)
    assert bench.after(10_000) is None
    assert not bench.engine.asked


def test_what_is_open_is_taken_back() -> None:
    bench = Bench()
    bench.after(50)
    bench.dog.close()
    assert bench.engine.aborted == [bench.engine.asked[0][0].request_id]
    assert bench.dog.request_ids == set()


async def test_a_real_engine_answers_and_holds_nothing_afterwards(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.add(Role.AGGREGATED, "a0")
        now: list[Any] = [0.0]
        dog = Watchdog(
            "a0", node.engine, node.info, lambda: 0, timeout_s=10.0, clock=lambda: now[0]
        )
        dog.check()
        now[0] = 5.0
        dog.check()
        assert dog.request_ids
        async with asyncio.timeout(10):
            while dog.request_ids:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0)
        now[0] = 10.0
        assert dog.check() is None
        await made.idle()

"""The prefill queue in one event loop: aborts, deadlines, limits, and a queue that comes and goes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nats_server import nats_server
from tests.fakes.queue import MemoryQueue
from tests.unit.worker.cluster import (
    ACK_WAIT_S,
    DEADLINE_S,
    cluster,
    prompt_of,
    request,
)
from tests.unit.worker.queue_stage import ENGINES, Stage, works
from trtllm_workers.config.outside import NatsLogin
from trtllm_workers.engines.base import DeliverPrefilled, Engine
from trtllm_workers.errors import EngineError
from trtllm_workers.planes.messages import (
    FillAsk,
    Filled,
    FillGrant,
    Message,
)
from trtllm_workers.planes.queue import Item
from trtllm_workers.planes.queue_nats import QueueSpec, open_nats_queue
from trtllm_workers.transfer.tcp import TcpLink
from trtllm_workers.types import FinishReason, Role
from trtllm_workers.worker.prefill_desk import HandoffLimits


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("behind", [None, FillAsk, FillGrant, "write", Filled])
async def test_an_abort_in_any_phase_leaves_no_block_and_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: Any, engine: str
) -> None:
    async with cluster(tmp_path, engine) as made:
        stage = Stage(made)
        await stage.chain()
        sent: list[int] = []

        def hook(message: Message) -> None:
            if behind not in (None, "write") and isinstance(message, behind) and sent:
                made.abort(sent[0], "d0")

        made.after_message = hook
        original = TcpLink.write

        async def cut(self: TcpLink, *args: Any) -> None:
            if behind == "write" and sent:
                made.abort(sent[0], "d0")
            await original(self, *args)

        monkeypatch.setattr(TcpLink, "write", cut)
        sent.append(made.submit(request(prompt_of(3, 90), max_tokens=400), "d0"))
        if behind is None:
            made.abort(sent[0], "d0")
        await made.client.until(lambda: sent[0] in made.client.last)
        assert made.client.last[sent[0]].finish_reason is FinishReason.ABORT
        await stage.settled()


async def test_a_deadline_takes_the_job_back_and_computes_it_here(tmp_path: Path) -> None:
    """One job is being computed when its time is over, another still lies in the queue."""
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 10000\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.add(Role.AGGREGATED, "a0")
        await stage.add(Role.PREFILL, "p0", extra={"cost_path": str(cost)})
        limits = HandoffLimits(prefill_timeout_s=1.0)
        await stage.add(Role.DECODE, "d0", limits=limits)
        await made.paired("d0", "p0")
        asked = [request(prompt_of(n, 200)) for n in range(3)]
        streams = [made.submit(one, "d0") for one in asked]
        for stream, one in zip(streams, asked, strict=True):
            assert await made.answer(stream) == await made.expected(one, "a0")
        assert made.nodes["d0"].fallbacks() == {"prefill_timeout": 3}
        await stage.settled()


class Broken:
    """An engine that cannot prefill reserved requests once ``broken``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prefill_reserved(self, request_id: str, count: int, deliver: DeliverPrefilled) -> None:
        if self.broken:
            raise EngineError("no more of these")
        self._engine.prefill_reserved(request_id, count, deliver)


async def test_a_prompt_that_prefill_cannot_compute_is_computed_here(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        engines: list[Broken] = []

        def wrap(engine: Engine) -> Engine:
            engines.append(Broken(engine))
            return engines[-1]

        await stage.add(Role.PREFILL, "p0", wrap=wrap)
        await stage.add(Role.DECODE, "d0")
        await made.paired("d0", "p0")
        engines[0].broken = True
        asked = request(prompt_of(1, 40))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "d0")
        assert made.nodes["d0"].fallbacks() == {"prefill_refused": 1}
        await stage.settled()


async def test_a_transfer_that_fails_is_made_up_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain()
        original = TcpLink.write

        async def broken(self: TcpLink, local: Any, remote: Any, timeout_s: float) -> None:
            await original(self, [10**6], remote, timeout_s)

        monkeypatch.setattr(TcpLink, "write", broken)
        asked = request(prompt_of(3, 40))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")
        assert made.nodes["d0"].fallbacks() == {"transfer_failed": 1}
        await stage.settled()


# --- the queue ---------------------------------------------------------------------------------


async def test_beyond_the_queues_size_decode_computes_prompts_itself(tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 500\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made, max_items=3)
        await stage.chain(extra={"cost_path": str(cost)})
        asked = [request(prompt_of(n, 100)) for n in range(10)]
        streams = [made.submit(one, "d0") for one in asked]
        for stream, one in zip(streams, asked, strict=True):
            assert await made.answer(stream) == await made.expected(one, "a0")
        jobs = stage.jobs()
        assert jobs["filled"] == 3
        assert (
            made.nodes["d0"].fallbacks() == {"queue_full": 7} == {"queue_full": jobs["queue_full"]}
        )
        await stage.settled()


async def test_without_the_queues_server_decode_computes_prompts_itself(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain()
        stage.hub.away = True
        asked = request(prompt_of(1, 40))
        expected = await made.expected(asked, "a0")
        assert await made.answer(made.submit(asked, "d0")) == expected
        assert made.nodes["d0"].fallbacks() == {"queue_away": 1}
        stage.hub.away = False
        stage.hub.tell()
        assert await made.answer(made.submit(asked, "d0")) == expected
        assert stage.jobs() == {"queue_away": 1, "filled": 1}
        await stage.settled()


async def test_a_short_uncached_part_is_computed_by_decode(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.add(Role.PREFILL, "p0")
        await stage.add(Role.DECODE, "d0", max_local=16)
        await made.paired("d0", "p0")
        await made.answer(made.submit(request(prompt_of(2, 16)), "d0"))
        assert stage.jobs() == {}
        await made.answer(made.submit(request(prompt_of(2, 17)), "d0"))
        assert stage.jobs() == {}, "all but a token is cached"
        await made.answer(made.submit(request(prompt_of(1, 40)), "d0"))
        assert stage.jobs() == {"filled": 1}
        assert made.nodes["d0"].service.meters.local == 2


async def test_what_is_no_job_is_dropped(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain()
        queue = MemoryQueue(stage.hub)
        for body in (b"", b"\xc1", b"\x90", bytes(100)):
            await queue.put(body)
        asked = request(prompt_of(1, 40))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")
        await stage.settled()


async def test_a_job_delivered_twice_is_granted_once(tmp_path: Path) -> None:
    """Word that it is worked on is lost; whoever gets it next is refused while the first one lives."""
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 8000\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made)

        class Mute(MemoryQueue):
            async def take(self, timeout_s: float) -> Item | None:  # type: ignore[override]
                item = await super().take(timeout_s)
                if item is not None:

                    async def working() -> None:
                        """Lost."""

                    item.working = working  # type: ignore[method-assign]
                return item

        await stage.add(Role.AGGREGATED, "a0")
        for name in ("p0", "p1"):
            extra = {"cost_path": str(cost)}
            await stage.add(Role.PREFILL, name, queue=Mute(stage.hub), extra=extra)
        await stage.add(Role.DECODE, "d0")
        for name in ("p0", "p1"):
            await made.paired("d0", name)
        asked = request(prompt_of(1, 100))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")
        redelivered = sum(made.nodes[p].service.meters.redelivered for p in ("p0", "p1"))
        assert redelivered >= 1
        assert stage.jobs() == {"filled": 1}
        await stage.settled()


async def test_a_draining_prefill_worker_finishes_what_it_has_and_takes_no_more(
    tmp_path: Path,
) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 2000\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain("p0", extra={"cost_path": str(cost)})
        asked = [request(prompt_of(n, 100)) for n in range(6)]
        expected = [await made.expected(one, "a0") for one in asked]
        streams = [made.submit(one, "d0") for one in asked]
        async with asyncio.timeout(DEADLINE_S):
            while not works(made, "p0"):  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.001)
        leaving = made.nodes["p0"]
        leaving.service.drain("test")
        taken = leaving.service.queue_end.num_open if leaving.service.queue_end else 0
        await stage.add(Role.PREFILL, "p1")
        for stream, tokens in zip(streams, expected, strict=True):
            assert await made.answer(stream) == tokens
        assert leaving.service.meters.filled == taken
        assert leaving.service.num_streams == 0
        assert made.nodes["d0"].fallbacks() == {}
        await stage.settled()


async def test_on_nats_the_tokens_are_the_same(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as server:
        async with cluster(tmp_path, "torch") as made:
            stage = Stage(made)

            async def queue() -> Any:
                spec = QueueSpec("work", ack_wait_s=ACK_WAIT_S)
                return await open_nats_queue(
                    [server.url], NatsLogin(), spec, name="test", decides=True
                )

            await stage.add(Role.AGGREGATED, "a0")
            for name in ("p0", "p1"):
                await stage.add(Role.PREFILL, name, queue=await queue())
            await stage.add(Role.DECODE, "d0", queue=await queue())
            for name in ("p0", "p1"):
                await made.paired("d0", name)
            asked = [request(prompt_of(n, 60 + n)) for n in range(8)]
            streams = [made.submit(one, "d0") for one in asked]
            await made.kill("p0")
            for stream, one in zip(streams, asked, strict=True):
                assert await made.answer(stream) == await made.expected(one, "a0")
            assert made.nodes["d0"].fallbacks() == {}
            await stage.settled()


@pytest.mark.parametrize("engine", ENGINES)
async def test_deaths_aborts_and_a_queue_that_comes_and_goes_leave_no_block(
    tmp_path: Path, engine: str
) -> None:
    """300 requests; each that is not aborted has the tokens of an aggregated run, once."""
    dice = random.Random(20261121)
    options = {"num_threads": "1"} if engine == "torch" else {}
    async with cluster(tmp_path, engine) as made:
        stage = Stage(made)
        await stage.add(Role.AGGREGATED, "a0", extra=options)
        await stage.add(Role.DECODE, "d0", extra=options, kv_cache_config__max_tokens=2048)
        names = [f"p{n}" for n in range(2)]
        for name in names:
            await stage.add(Role.PREFILL, name, extra=options)
            await made.paired("d0", name)
        prompts = [prompt_of(n, 1 + 13 * n) for n in range(18)]
        expected = [await made.expected(request(prompt), "a0") for prompt in prompts]
        kept: list[tuple[int, int]] = []
        number = len(names)
        for turn in range(300):
            which = dice.randrange(len(prompts))
            stream = made.submit(request(prompts[which]), "d0")
            if dice.random() < 0.3:
                made.abort(stream, "d0")
            else:
                kept.append((stream, which))
            if dice.random() < 0.6 and len(made.client.last) <= turn:
                await made.client.happened()
            if turn % 60 == 59:
                await made.kill(names.pop(0))
                names.append(f"p{number}")
                number += 1
                await stage.add(Role.PREFILL, names[-1], extra=options)
                await made.paired("d0", names[-1])
            if turn % 100 == 40:
                stage.hub.away = True
            if turn % 100 == 60:
                stage.hub.away = False
                stage.hub.tell()
        outcomes: Counter[bool] = Counter()
        for stream, which in kept:
            outcomes[await made.answer(stream) == expected[which]] += 1
        assert outcomes == {True: len(kept)}
        await stage.settled()
        assert stage.jobs()["filled"] > 30

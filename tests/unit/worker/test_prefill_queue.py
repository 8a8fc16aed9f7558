"""The prefill queue in one event loop: real engines, meshes and transports, deaths at every step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.unit.worker.cluster import (
    DEADLINE_S,
    cluster,
    prompt_of,
    request,
)
from tests.unit.worker.queue_stage import ENGINES, Stage, works
from trtllm_workers.planes.messages import (
    FillAnswer,
    FillAsk,
    Filled,
    FillGrant,
    FillKeep,
    FillKept,
    Message,
)
from trtllm_workers.transfer.tcp import TcpLink
from trtllm_workers.types import Role
from trtllm_workers.worker.prefill_desk import HandoffLimits
from trtllm_workers.worker.queued_prefill import FenceTimes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transport", ["tcp", "ucx", "nixl"])
async def test_tokens_equal_those_of_an_aggregated_run(
    tmp_path: Path, engine: str, transport: str
) -> None:
    """Prompts within a block, on its border, over several steps; prefix hits on the second round."""
    async with cluster(tmp_path, engine, transport) as made:
        stage = Stage(made)
        await stage.chain()
        asked = [request(prompt_of(n, n)) for n in (1, 7, 8, 9, 64, 65, 200)]
        for _round in range(2):
            streams = [made.submit(one, "d0") for one in asked]
            for stream, one in zip(streams, asked, strict=True):
                assert await made.answer(stream) == await made.expected(one, "a0")
        assert made.nodes["d0"].fallbacks() == {}
        assert stage.jobs() == {"filled": 2 * len(asked)}
        await stage.settled()


@pytest.mark.parametrize("engine", ENGINES)
async def test_blocks_that_decode_has_are_read_and_not_computed(
    tmp_path: Path, engine: str
) -> None:
    async with cluster(tmp_path, engine) as made:
        stage = Stage(made)
        await stage.chain()
        prompt = prompt_of(3, 100)
        await made.expected(request(prompt), "d0")  # decode computes it by itself, and keeps it
        prefill = made.nodes["p0"].engine
        before = prefill.stats()
        asked = request([*prompt, *prompt_of(4, 30)])
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")
        after = prefill.stats()
        assert after.prompt_tokens - before.prompt_tokens == 130
        assert after.cached_prompt_tokens - before.cached_prompt_tokens >= 96
        moved = made.nodes["d0"].service.pairs
        assert moved is not None
        # What was read is in prefill's cache from now on, and right.
        assert await made.expected(asked, "p0") == await made.expected(asked, "a0")
        await stage.settled()


async def test_a_first_token_that_is_the_last_writes_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain()
        asked = request(prompt_of(1, 30), max_tokens=1)
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")
        await stage.settled()


async def test_two_prefill_workers_share_the_work(tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 200\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain("p0", "p1", extra={"cost_path": str(cost)})
        asked = [request(prompt_of(n, 100)) for n in range(12)]
        streams = [made.submit(one, "d0") for one in asked]
        for stream, one in zip(streams, asked, strict=True):
            assert await made.answer(stream) == await made.expected(one, "a0")
        shares = [made.nodes[p].service.meters.filled for p in ("p0", "p1")]
        assert sum(shares) == 12
        assert min(shares) >= 2
        await stage.settled()


async def test_a_worker_takes_no_more_than_its_engine_can_begin_soon(tmp_path: Path) -> None:
    """64 tokens a step, two steps ahead: of prompts of 100 tokens, two at a time."""
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 100\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain(extra={"cost_path": str(cost)})
        puller = made.nodes["p0"].service.queue_end
        most = 0

        def look(_message: Message) -> None:
            nonlocal most
            most = max(most, puller.num_open if puller is not None else 0)

        made.after_message = look
        asked = [request(prompt_of(n, 100)) for n in range(10)]
        for stream in [made.submit(one, "d0") for one in asked]:
            await made.answer(stream)
        assert 2 <= most <= 4  # those that write are computed already
        await stage.settled()


# --- deaths ------------------------------------------------------------------------------------


def once(action: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that starts ``action`` the first time it is called."""
    started: list[Any] = []

    def act() -> None:
        if not started:
            started.append(asyncio.ensure_future(action()))

    act.started = started  # type: ignore[attr-defined]
    return act


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "behind", [FillAsk, FillGrant, FillKeep, FillKept, "read", "write", Filled, FillAnswer]
)
async def test_a_prefill_worker_lost_at_any_point_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: Any, engine: str
) -> None:
    """The job is given to the other worker; decode goes on once, with the right tokens."""
    async with cluster(tmp_path, engine) as made:
        stage = Stage(made)
        await stage.chain("p0", "p1")
        prompt = prompt_of(3, 90)
        await made.expected(request(prompt), "d0")
        asked = request([*prompt, *prompt_of(5, 60)], max_tokens=30)
        expected = await made.expected(asked, "a0")
        taker: list[str] = []

        async def kill() -> None:
            await made.kill(taker[0])

        kill_once = once(kill)

        def hook(message: Message) -> None:
            if behind not in ("read", "write") and isinstance(message, behind):
                taker[:] = [name for name in ("p0", "p1") if works(made, name)] or taker
                if taker:
                    kill_once()

        made.after_message = hook
        for operation in ("read", "write"):
            original = getattr(TcpLink, operation)

            async def cut(
                self: TcpLink,
                a: Sequence[int],
                b: Sequence[int],
                timeout_s: float,
                original: Any = original,
                operation: str = operation,
            ) -> None:
                if behind == operation and not taker and self._our_id.startswith("p"):
                    taker[:] = [self._our_id]
                    kill_once()
                    await asyncio.sleep(0)
                await original(self, a, b, timeout_s)

            monkeypatch.setattr(TcpLink, operation, cut)
        stream = made.submit(asked, "d0")
        assert await made.answer(stream) == expected
        await asyncio.gather(*kill_once.started)  # type: ignore[attr-defined]
        assert kill_once.started, "nobody was killed"  # type: ignore[attr-defined]
        assert made.nodes["d0"].fallbacks() == {}
        await stage.settled()


async def test_a_job_of_the_only_worker_waits_for_its_successor(tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 1000\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        slow = {"extra": {"cost_path": str(cost)}}
        await stage.chain(**slow)
        asked = request(prompt_of(3, 90))
        expected = await made.expected(asked, "a0")
        stream = made.submit(asked, "d0")
        async with asyncio.timeout(DEADLINE_S):
            while not works(made, "p0"):  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.001)
        await made.kill("p0")
        await stage.add(Role.PREFILL, "p1")
        assert await made.answer(stream) == expected
        assert made.nodes["d0"].fallbacks() == {}
        assert made.nodes["p1"].service.meters.redelivered >= 1
        assert stage.jobs() == {"lost": 1, "filled": 1}
        await stage.settled()


async def test_a_job_that_nobody_is_left_for_is_computed_here(tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 1000\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        await stage.chain(extra={"cost_path": str(cost)})
        asked = request(prompt_of(3, 90))
        expected = await made.expected(asked, "a0")
        stream = made.submit(asked, "d0")
        async with asyncio.timeout(DEADLINE_S):
            while not works(made, "p0"):  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.001)
        await made.kill("p0")
        assert await made.answer(stream) == expected
        assert made.nodes["d0"].fallbacks() == {"no_prefill_worker": 1}
        await stage.settled()
        assert await made.answer(made.submit(asked, "d0")) == expected  # and at once from now on


async def test_a_decode_worker_lost_with_its_jobs_leaves_nothing(tmp_path: Path) -> None:
    cost = tmp_path / "cost.yaml"
    cost.write_text("prefill:\n  per_token_us: 500\n")
    async with cluster(tmp_path) as made:
        stage = Stage(made, max_age_s=3.0)
        limits = HandoffLimits(prefill_timeout_s=2.0)
        await stage.chain(extra={"cost_path": str(cost)}, limits=limits)
        for number in range(8):
            made.submit(request(prompt_of(number, 100)), "d0")
        async with asyncio.timeout(DEADLINE_S):
            while not works(made, "p0"):  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.001)
        await made.kill("d0")
        await stage.settled()
        assert not works(made, "p0")


# --- the fence ---------------------------------------------------------------------------------


async def test_blocks_are_not_computed_into_while_a_lost_writer_may_write(tmp_path: Path) -> None:
    """The writer stands in the middle of a write when its connection is lost; decode waits."""
    async with cluster(tmp_path) as made:
        stage = Stage(made)
        fence = FenceTimes(ended_s=0.4, silent_s=0.4, lonely_s=0.1)
        await stage.chain("p0", fence=fence)
        asked = request(prompt_of(3, 90))
        expected = await made.expected(asked, "a0")
        decode = made.nodes["d0"]
        writing, release = asyncio.Event(), asyncio.Event()
        cut_s = ended_s = 0.0
        loop = asyncio.get_running_loop()
        original = TcpLink.write

        async def stuck(self: TcpLink, *args: Any) -> None:
            writing.set()
            try:
                await release.wait()
            finally:
                await original(self, *args)  # it writes though nobody wants it any more

        TcpLink.write = stuck  # type: ignore[method-assign, assignment]
        try:
            stream = made.submit(asked, "d0")
            async with asyncio.timeout(DEADLINE_S):
                await writing.wait()
            resumed: list[float] = []
            resume = decode.engine.resume

            def noted(*args: Any) -> None:
                resumed.append(loop.time())
                resume(*args)

            decode.engine.resume = noted  # type: ignore[method-assign, assignment]
            made.discovery.kill("p0")
            peer = decode.mesh.peer(made.nodes["p0"].mesh.address)
            assert peer is not None
            cut_s = loop.time()
            peer.lose(Exception("cut"))  # type: ignore[arg-type]
            assert await made.answer(stream) == expected
            ended_s = resumed[0]
        finally:
            TcpLink.write = original  # type: ignore[method-assign]
        assert ended_s - cut_s >= 0.4
        await stage.settled()

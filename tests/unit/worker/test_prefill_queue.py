"""The prefill queue in one event loop: real engines, meshes and transports, deaths at every step."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.nats_server import nats_server
from tests.fakes.queue import MemoryQueue, MemoryQueueHub
from tests.unit.worker.cluster import (
    ACK_WAIT_S,
    DEADLINE_S,
    Cluster,
    Node,
    cluster,
    prompt_of,
    request,
)
from trtllm_workers.config.outside import NatsLogin
from trtllm_workers.engines.base import DeliverPrefilled, Engine
from trtllm_workers.errors import EngineError
from trtllm_workers.planes.messages import (
    FillAnswer,
    FillAsk,
    Filled,
    FillGrant,
    FillKeep,
    FillKept,
    Message,
)
from trtllm_workers.planes.queue import Item
from trtllm_workers.planes.queue_nats import QueueSpec, open_nats_queue
from trtllm_workers.transfer.tcp import TcpLink
from trtllm_workers.types import FinishReason, Role
from trtllm_workers.worker.prefill_desk import HandoffLimits
from trtllm_workers.worker.queued_prefill import FenceTimes

ENGINES = ["sim", "torch"]


class Stage:
    """A cluster whose workers share one queue."""

    def __init__(self, made: Cluster, **hub: Any) -> None:
        self.made = made
        self.hub = MemoryQueueHub(**{"ack_wait_s": ACK_WAIT_S, **hub})

    async def add(self, role: Role, worker_id: str, **options: Any) -> Node:
        if role is not Role.AGGREGATED:
            options.setdefault("queue", MemoryQueue(self.hub))
        return await self.made.add(role, worker_id, **options)

    async def chain(self, *prefills: str, **options: Any) -> None:
        """Start an aggregated worker to compare with, prefill workers and a decode worker."""
        await self.add(Role.AGGREGATED, "a0")
        for prefill in prefills or ("p0",):
            await self.add(Role.PREFILL, prefill, **options)
        await self.add(Role.DECODE, "d0", **options)
        for prefill in prefills or ("p0",):
            await self.made.paired("d0", prefill)

    def jobs(self) -> dict[str, int]:
        return dict(self.made.nodes["d0"].service.meters.counts().queue_jobs)

    async def settled(self) -> None:
        """Wait until nobody holds a block, and the queue is empty."""
        await self.made.idle()
        async with asyncio.timeout(DEADLINE_S):
            while self.hub.kept:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.01)
        for node in self.made.nodes.values():
            assert node.held_blocks == 0
            assert node.service.meters.leaked_blocks == 0


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


def works(made: Cluster, name: str) -> bool:
    """Whether a prefill worker has a job."""
    node = made.nodes.get(name)
    end = node.service.queue_end if node is not None else None
    return end is not None and end.num_open > 0


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

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.tiny_models import make_tiny_checkpoint
from tests.unit.worker.cluster import config_of
from tests.unit.worker.test_service import FakeIngress, worker
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.planes.messages import Drain, EventsAsk, KvEvents, StopAsk
from trtllm_workers.types import EngineInfo, KvEvent, KvEventKind
from trtllm_workers.worker import kv_feeds
from trtllm_workers.worker.kv_feeds import why_no_events
from trtllm_workers.worker.stopping import Stopping


async def started(tmp_path: Path) -> tuple[Engine, EngineInfo]:
    folder = make_tiny_checkpoint(tmp_path / "model")
    engine = build_engine("sim", EngineOptions(model_path=folder, config=config_of("sim")))
    return engine, await engine.start()


def events_of(ingress: FakeIngress, turn: int) -> list[KvEvent]:
    return [
        event
        for one in ingress.others
        if isinstance(one, KvEvents) and one.turn == turn
        for event in one.events
    ]


def stored(events: list[KvEvent]) -> list[bytes]:
    return [h for one in events if one.kind is KvEventKind.STORED for h in one.block_hashes]


async def test_events_begin_with_a_snapshot_and_go_on_without_a_gap(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        ingress.submit(peer, 1, prompt=100)
        await ingress.until(lambda: 1 in ingress.last)
        peer.send(EventsAsk(7))
        await ingress.until(lambda: stored(events_of(ingress, 7)))
        snapshot = events_of(ingress, 7)
        assert snapshot[0].kind is KvEventKind.CLEARED
        assert {one.seq for one in snapshot} == {snapshot[0].seq}, "all of the same moment"
        known = stored(snapshot)
        ingress.submit(peer, 2, prompt=200)
        await ingress.until(lambda: len(stored(events_of(ingress, 7))) > len(known) + 2)
        later = events_of(ingress, 7)[len(snapshot) :]
        assert [one.seq for one in later] == list(
            range(snapshot[0].seq + 1, snapshot[0].seq + 1 + len(later))
        )


async def test_asked_again_a_feed_begins_anew_and_the_old_one_ends(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        peer.send(EventsAsk(1))
        await ingress.until(lambda: events_of(ingress, 1))
        peer.send(EventsAsk(2))
        await ingress.until(lambda: events_of(ingress, 2))
        seen = len(events_of(ingress, 1))
        ingress.submit(peer, 1, prompt=100)
        await ingress.until(lambda: stored(events_of(ingress, 2)))
        assert len(events_of(ingress, 1)) == seen


async def test_two_ingresses_have_a_feed_each_and_a_lost_one_leaves_no_task(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack:
        async with stack.ingress("one") as (one, peer):
            peer.send(EventsAsk(1))
            await one.until(lambda: events_of(one, 1))
            async with stack.ingress("two") as (two, other):
                other.send(EventsAsk(1))
                await two.until(lambda: events_of(two, 1))
                one.submit(peer, 1, prompt=100)
                await one.until(lambda: stored(events_of(one, 1)))
                await two.until(lambda: stored(events_of(two, 1)))
        left = {one for one in asyncio.all_tasks() if one.get_name().startswith("KV events")}
        if left:
            _, pending = await asyncio.wait(left, timeout=5)
            assert not pending


async def test_an_engine_that_publishes_shows_it(tmp_path: Path) -> None:
    engine, info = await started(tmp_path)
    assert await why_no_events(engine, info) == ""
    assert engine.stats().active_blocks == 0
    await engine.close()


class Silent:
    """An engine whose events never come."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def kv_events(self) -> AsyncIterator[KvEvent]:
        yield KvEvent(seq=0, kind=KvEventKind.CLEARED)
        await asyncio.Event().wait()


async def test_an_engine_that_only_says_so_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_feeds, "PROOF_TIMEOUT_S", 0.5)
    engine, info = await started(tmp_path)
    assert "no event within" in await why_no_events(Silent(engine), info)
    await engine.close()


async def test_being_asked_to_stop_is_answered_and_passed_on(tmp_path: Path) -> None:
    async with worker(tmp_path) as stack, stack.ingress() as (ingress, peer):
        asked: list[StopAsk] = []
        stack.service._on_stop_ask = asked.append
        peer.send(StopAsk(3.0, "closing"))
        await ingress.until(lambda: asked)
        await ingress.until(lambda: Drain("closing") in ingress.others)
        assert asked == [StopAsk(3.0, "closing")]


async def test_a_process_that_does_not_end_is_killed_and_a_launcher_is_told_first() -> None:
    stop, killed = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def kill() -> None:
        loop.call_soon_threadsafe(killed.set)

    stopping = Stopping(stop, 30.0, None, kill)
    stopping.ask(StopAsk(-9.9, "now"))  # the grace after it is over at once
    stopping.ask(StopAsk(100.0, "again"))
    assert stop.is_set()
    assert stopping.drain_timeout_s == -9.9
    await asyncio.wait_for(killed.wait(), 5)

    stop = asyncio.Event()
    Stopping(stop, 30.0, lambda: True).ask(StopAsk(0.0, "now"))
    assert not stop.is_set(), "the launcher sends TERM in its turn"

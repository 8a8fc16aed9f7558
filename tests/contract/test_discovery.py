"""The contract of discovery (planes/base.py), line by line, on every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol, cast

import msgspec
import pytest

from tests.contract.etcd import EtcdServer
from tests.contract.planes import record, seen, soon, watching
from tests.fakes.planes import MemoryDiscovery, MemoryLease
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.base import Discovery, Lease
from trtllm_workers.planes.discovery_etcd import EtcdDiscovery
from trtllm_workers.planes.discovery_file import FileDiscovery
from trtllm_workers.types import WorkerState

TTL_S = 0.6
ETCD_TTL_S = 1.0  # etcd counts in whole seconds
POLL_S = 0.02


class Deployment(Protocol):
    """One implementation of discovery under test."""

    def discovery(self) -> Discovery:
        """Return discovery as one more process of the deployment sees it."""

    async def let_die(self, lease: Lease) -> None:
        """End a lease's owner as if it had been killed."""

    async def close(self) -> None: ...


class Memory:
    def __init__(self, _root: Path) -> None:
        self._shared = MemoryDiscovery()

    def discovery(self) -> Discovery:
        return self._shared

    async def let_die(self, lease: Lease) -> None:
        self._shared.remove(cast("MemoryLease", lease)._record)

    async def close(self) -> None:
        await soon(self._shared.close())


class File:
    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: list[FileDiscovery] = []

    def discovery(self) -> Discovery:
        self._made.append(FileDiscovery(self._root, ttl_s=TTL_S, poll_interval_s=POLL_S))
        return self._made[-1]

    async def let_die(self, lease: Lease) -> None:
        task = lease._task  # type: ignore[attr-defined]  # what a kill would stop
        task.cancel()
        await asyncio.wait({task})

    async def close(self) -> None:
        for discovery in self._made:
            await soon(discovery.close())


class Etcd:
    def __init__(self, server: EtcdServer, namespace: str) -> None:
        self._server = server
        self._namespace = namespace
        self._made: list[EtcdDiscovery] = []

    def discovery(self) -> Discovery:
        made = EtcdDiscovery(self._server.url, self._namespace, ttl_s=ETCD_TTL_S)
        self._made.append(made)
        return made

    async def let_die(self, lease: Lease) -> None:
        task = lease._task  # type: ignore[attr-defined]  # what a kill would stop
        task.cancel()
        await asyncio.wait({task})

    async def close(self) -> None:
        for discovery in self._made:
            await soon(discovery.close())


KINDS = ["memory", "file", "etcd"]


@pytest.fixture(params=KINDS)
async def deployment(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Deployment]:
    made: Deployment
    if request.param == "etcd":
        made = Etcd(request.getfixturevalue("shared_server"), request.getfixturevalue("namespace"))
    else:
        root = tmp_path / "deployment"
        made = Memory(root) if request.param == "memory" else File(root)
    yield made
    await made.close()


async def test_watch_yields_the_full_set_at_once(deployment: Deployment) -> None:
    first, second = record("worker-0"), record("worker-1")
    owner = deployment.discovery()
    await owner.register(first)
    await owner.register(second)
    async with watching(deployment.discovery()) as watch:
        assert await soon(anext(watch)) == (first, second)


async def test_watch_of_an_empty_deployment_yields_an_empty_set(deployment: Deployment) -> None:
    async with watching(deployment.discovery()) as watch:
        assert await soon(anext(watch)) == ()


async def test_every_watcher_sees_a_record_that_is_registered(deployment: Deployment) -> None:
    async with (
        watching(deployment.discovery()) as one,
        watching(deployment.discovery()) as other,
    ):
        await seen(one)
        await seen(other)
        newcomer = record("worker-0")
        await deployment.discovery().register(newcomer)
        await seen(one, newcomer)
        await seen(other, newcomer)


async def test_two_watches_of_one_discovery_both_see_everything(deployment: Deployment) -> None:
    discovery = deployment.discovery()
    async with watching(discovery) as one, watching(discovery) as other:
        await seen(one)
        newcomer = record("worker-0")
        await discovery.register(newcomer)
        await seen(one, newcomer)
        await seen(other, newcomer)


async def test_sets_are_sorted_by_worker_id(deployment: Deployment) -> None:
    records = [record(worker_id) for worker_id in ("worker-2", "worker-10", "a", "Z")]
    discovery = deployment.discovery()
    for each in records:
        await discovery.register(each)
    async with watching(discovery) as watch:
        await seen(watch, *sorted(records, key=lambda each: each.worker_id))


async def test_every_field_of_a_record_arrives(deployment: Deployment) -> None:
    original = msgspec.structs.replace(
        record("a/b c.d@e%", model="Org/Model ü"), state=WorkerState.DRAINING, started_at_s=1.5
    )
    await deployment.discovery().register(original)
    async with watching(deployment.discovery()) as watch:
        await seen(watch, original)


async def test_record_stays_while_its_lease_is_held(deployment: Deployment) -> None:
    stays = record("stays")
    await deployment.discovery().register(stays)
    owner = deployment.discovery()
    async with watching(deployment.discovery()) as watch:
        await seen(watch, stays)
        # A record that dies marks one time to live, in which the held one must not blink.
        dies = record("dies")
        lease = await owner.register(dies)
        yielded = await seen(watch, dies, stays)
        await deployment.let_die(lease)
        yielded += await seen(watch, stays)
        assert all(stays in records for records in yielded)


async def test_record_whose_owner_died_vanishes(deployment: Deployment) -> None:
    lease = await deployment.discovery().register(record("worker-0"))
    async with watching(deployment.discovery()) as watch:
        await soon(anext(watch))
        await deployment.let_die(lease)
        await seen(watch)


async def test_update_replaces_the_record_for_watchers(deployment: Deployment) -> None:
    original = record("worker-0")
    lease = await deployment.discovery().register(original)
    async with watching(deployment.discovery()) as watch:
        await seen(watch, original)
        draining = msgspec.structs.replace(original, state=WorkerState.DRAINING)
        await lease.update(draining)
        await seen(watch, draining)


async def test_lease_close_removes_the_record_at_once_and_is_safe_twice(
    deployment: Deployment,
) -> None:
    original = record("worker-0")
    lease = await deployment.discovery().register(original)
    async with watching(deployment.discovery()) as watch:
        await seen(watch, original)
        await soon(lease.close())
        await soon(lease.close())
        await seen(watch)


async def test_second_close_of_a_lease_does_not_remove_its_successor(
    deployment: Deployment,
) -> None:
    original = record("worker-0")
    discovery = deployment.discovery()
    first = await discovery.register(original)
    await soon(first.close())
    await discovery.register(original)
    await soon(first.close())
    async with watching(deployment.discovery()) as watch:
        assert await soon(anext(watch)) == (original,)


async def test_slow_reader_sees_the_latest_set(deployment: Deployment) -> None:
    discovery = deployment.discovery()
    async with watching(discovery) as slow, watching(discovery) as quick:
        await seen(slow)
        records = [record(f"worker-{index}") for index in range(5)]
        for number, each in enumerate(records, start=1):
            await discovery.register(each)
            await seen(quick, *records[:number])
        assert await soon(anext(slow)) == tuple(records)


async def test_younger_incarnation_wins(deployment: Deployment) -> None:
    older, younger = (record("worker-0", incarnation=life) for life in ("18e9aa", "18e9bb"))
    async with watching(deployment.discovery()) as watch:
        await deployment.discovery().register(older)
        await seen(watch, older)
        await deployment.discovery().register(younger)
        await seen(watch, younger)


async def test_younger_incarnation_wins_when_registered_first(deployment: Deployment) -> None:
    older, younger = (record("worker-0", incarnation=life) for life in ("18e9aa", "18e9bb"))
    await deployment.discovery().register(younger)
    await deployment.discovery().register(older)
    async with watching(deployment.discovery()) as watch:
        assert await soon(anext(watch)) == (younger,)


async def test_update_of_the_older_lease_is_refused_while_the_younger_lives(
    deployment: Deployment,
) -> None:
    older, younger = (record("worker-0", incarnation=life) for life in ("18e9aa", "18e9bb"))
    old_lease = await deployment.discovery().register(older)
    young_lease = await deployment.discovery().register(younger)
    changed = msgspec.structs.replace(older, model="other")
    with pytest.raises(ConfigError, match=r"18e9bb.*18e9aa"):
        await old_lease.update(changed)
    await young_lease.close()
    await old_lease.update(changed)
    async with watching(deployment.discovery()) as watch:
        await seen(watch, changed)


async def test_close_ends_watches_and_leases_and_is_safe_twice(deployment: Deployment) -> None:
    before = asyncio.all_tasks()
    discovery = deployment.discovery()
    await discovery.register(record("worker-0"))
    watch = discovery.watch()
    await soon(anext(watch))

    async def read_on() -> int:
        return len([records async for records in watch])

    reader = asyncio.create_task(read_on())
    await asyncio.sleep(0)
    await soon(discovery.close())
    await soon(discovery.close())
    assert await soon(reader) == 0
    assert asyncio.all_tasks() == before

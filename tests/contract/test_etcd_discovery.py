"""What discovery on etcd does beyond the contract: etcd that stands still, dies, forgets."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from tests.contract.etcd import Admin, EtcdServer, admin, etcd_cluster
from tests.contract.etcd_watchers import (
    LONGER_THAN_A_LEASE_S,
    TTL_S,
    Processes,
    Relay,
    following,
)
from tests.contract.planes import record, soon, watching
from trtllm_workers.config.outside import EtcdLogin
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.base import Lease
from trtllm_workers.planes.discovery_etcd import EtcdDiscovery
from trtllm_workers.planes.etcd_errors import Compacted
from trtllm_workers.planes.etcd_secret import secret_on_etcd
from trtllm_workers.planes.record_keys import record_key, workers_prefix
from trtllm_workers.types import WorkerState

Logs = list[MutableMapping[str, Any]]


async def let_die(lease: Lease) -> None:
    """End a lease's owner as if it had been killed."""
    task = cast("asyncio.Task[None]", lease._task)  # type: ignore[attr-defined]  # what a kill stops
    task.cancel()
    await asyncio.wait({task})


def troubles(logs: Logs) -> tuple[int, int]:
    """Return how often trouble began and was over, as the logs tell."""
    events = [log["event"] for log in logs]
    begins = "etcd cannot be used, trying again; what was known stays"
    return events.count(begins), events.count("etcd works again")


# etcd is away


async def test_etcd_that_stands_still_for_longer_than_a_lease_costs_nobody(
    server: EtcdServer, processes: Processes
) -> None:
    stays, newcomer = record("stays"), record("newcomer")
    owner = processes.one(server.url)
    await owner.register(stays)
    with capture_logs() as logs:
        async with following(processes.one(server.url), stays) as follower:
            server.stop()
            await follower.stays(stays)
            server.go_on()  # and it deletes what has run out meanwhile
            await follower.stays(stays)
            await owner.register(newcomer)
            await follower.until(newcomer, stays)
            assert all(stays in records for records in follower.sets)
    assert troubles(logs) == (2, 2)  # one of the owner, one of the watcher


async def test_etcd_that_is_killed_and_started_again_costs_nobody(
    server: EtcdServer, processes: Processes
) -> None:
    stays, newcomer = record("stays"), record("newcomer")
    owner = processes.one(server.url)
    await owner.register(stays)
    with capture_logs() as logs:
        async with following(processes.one(server.url), stays) as follower:
            server.kill()
            await follower.stays(stays)
            await asyncio.to_thread(server.start)
            await follower.stays(stays)
            await owner.register(newcomer)
            await follower.until(newcomer, stays)
            assert all(stays in records for records in follower.sets)
    assert troubles(logs) == (2, 2)


async def test_etcd_that_lost_its_data_is_filled_again(
    server: EtcdServer, processes: Processes
) -> None:
    stays, dies = record("stays"), record("dies")
    secret = await secret_on_etcd(server.url, "default", EtcdLogin(), 5.0)
    owner = processes.one(server.url)
    await owner.register(stays)
    dying = await processes.one(server.url).register(dies)
    async with admin(server) as operator:
        for number in range(50):  # so that its revisions begin far below those seen before
            await operator.put("/other", b"%d" % number)
    async with following(processes.one(server.url), dies, stays) as follower:
        server.kill()
        server.forget()
        await let_die(dying)
        await asyncio.to_thread(server.start)
        await follower.until(stays)  # one time to live later: it did not register again
        assert all(stays in records for records in follower.sets)
    async with following(processes.one(server.url), stays):
        pass  # a new watcher sees the same
    assert await secret_on_etcd(server.url, "default", EtcdLogin(), 5.0) == secret


async def test_worker_that_dies_while_etcd_is_away_vanishes_afterwards(
    server: EtcdServer, processes: Processes
) -> None:
    lease = await processes.one(server.url).register(record("dies"))
    async with following(processes.one(server.url), lease._record) as follower:
        server.stop()
        await let_die(lease)
        await follower.stays(lease._record)
        server.go_on()
        await follower.until()


async def test_update_while_etcd_is_away_is_written_when_it_is_back(
    server: EtcdServer, processes: Processes
) -> None:
    original = record("worker-0")
    draining = msgspec.structs.replace(original, state=WorkerState.DRAINING)
    lease = await processes.one(server.url).register(original)
    async with following(processes.one(server.url), original) as follower:
        server.kill()
        await soon(lease.update(draining))
        await asyncio.to_thread(server.start)
        await follower.until(draining)


async def test_close_while_etcd_stands_still_is_bounded(
    server: EtcdServer, processes: Processes
) -> None:
    owner = processes.one(server.url)
    await owner.register(record("worker-0"))
    server.stop()
    began_s = time.monotonic()
    with capture_logs() as logs:
        await soon(owner.close())
    assert time.monotonic() - began_s < 4
    server.go_on()
    assert "it vanishes with its lease" in str(logs)


async def test_cluster_that_loses_members_and_its_majority_costs_nobody(
    tmp_path: Path, processes: Processes
) -> None:
    stays, newcomer = record("stays"), record("newcomer")
    with etcd_cluster(tmp_path / "cluster", 3) as members:
        urls = [member.url for member in members]
        # On a busy machine an election takes longer than the shortest lease.
        owner = processes.one(*urls, ttl_s=TTL_S + 1)
        longer_s = LONGER_THAN_A_LEASE_S + 1
        await owner.register(stays)
        async with following(processes.one(*urls, ttl_s=TTL_S + 1), stays) as follower:
            members[0].kill()  # the one that both are connected to
            await follower.stays(stays, for_s=longer_s)
            await owner.register(newcomer)
            await follower.until(newcomer, stays)
            members[1].kill()  # the last one is alive, but may decide nothing
            await follower.stays(newcomer, stays, for_s=longer_s)
            await asyncio.to_thread(members[0].start)
            # A lease this short may run out before its owner has found the new leader; it comes again.
            await follower.until(newcomer, stays)
            later = record("later")
            await owner.register(later)
            await follower.until(later, newcomer, stays)
        await processes.close()


# A watcher alone loses its connection


@pytest.fixture
async def relay(shared_server: EtcdServer) -> AsyncIterator[Relay]:
    made = Relay(shared_server)
    await made.open()
    yield made
    await made.cut()


async def test_watch_goes_on_at_the_next_member(
    shared_server: EtcdServer, relay: Relay, processes: Processes, namespace: str
) -> None:
    stays, newcomer = record("stays"), record("newcomer")
    both = (relay.url, shared_server.url)
    owner = processes.one(*both, namespace=namespace)
    await owner.register(stays)
    async with following(processes.one(*both, namespace=namespace), stays) as follower:
        await relay.cut()
        await follower.stays(stays)
        await owner.register(newcomer)
        await follower.until(newcomer, stays)
        await relay.open()


@pytest.mark.parametrize("compacted", [False, True])
async def test_what_happened_while_a_watch_was_broken_is_seen_afterwards(
    shared_server: EtcdServer,
    relay: Relay,
    processes: Processes,
    namespace: str,
    compacted: bool,
) -> None:
    stays, closes, comes, came_and_went = (
        record(name) for name in ("stays", "closes", "comes", "came and went")
    )
    near = processes.one(shared_server.url, namespace=namespace)
    await near.register(stays)
    closing = await near.register(closes)
    far = processes.one(relay.url, namespace=namespace)
    async with following(far, closes, stays) as follower:
        await relay.cut()
        await closing.close()
        await near.register(comes)
        await (await near.register(came_and_went)).close()
        if compacted:
            async with admin(shared_server) as operator:
                await operator.compact()
        await relay.open()
        await follower.until(comes, stays)
        assert all(came_and_went not in records for records in follower.sets)
        took_s = follower.moments[-1] - min(
            moment
            for moment, records in zip(follower.moments, follower.sets, strict=True)
            if comes in records
        )
        # Where nothing tells any more that it closed, it is believed to live for one more ttl.
        assert took_s > 0.9 * TTL_S if compacted else took_s < 0.5 * TTL_S


async def test_events_that_are_no_longer_kept_are_told_as_such(shared_server: EtcdServer) -> None:
    async with admin(shared_server) as operator:
        await operator.put("/compacted", b"1")
        await operator.put("/compacted", b"2")
        await operator.compact()
        with pytest.raises(Compacted):
            async with operator.client.watch("/compacted/", 1) as batches:
                await soon(anext(batches))


# Keys


async def test_key_that_others_deleted_is_written_again(
    shared_server: EtcdServer, processes: Processes, namespace: str, operator: Admin
) -> None:
    mine = record("a/b %")
    owner = processes.one(shared_server.url, namespace=namespace)
    await owner.register(mine)
    key = record_key(workers_prefix(namespace), mine.worker_id, mine.address.incarnation)
    async with following(processes.one(shared_server.url, namespace=namespace), mine) as follower:
        await operator.delete(key)
        await follower.until()
        await follower.until(mine)


async def test_value_that_cannot_be_read_is_skipped_and_logged_once(
    shared_server: EtcdServer, processes: Processes, namespace: str, operator: Admin
) -> None:
    mine = record("worker-0")
    prefix = workers_prefix(namespace)
    owner = processes.one(shared_server.url, namespace=namespace)
    await owner.register(mine)
    (key,) = [key for key in await operator.keys() if key.startswith(prefix)]
    copied = await operator.client.get(key)
    assert copied is not None
    with capture_logs() as logs:
        async with following(
            processes.one(shared_server.url, namespace=namespace), mine
        ) as follower:
            for value in (b"noise", b"more noise", b'{"format":7}', copied):
                await operator.put(f"{prefix}worker-9/1", value)
            await operator.put(f"{prefix}\udc80".encode(errors="replace").decode(), b"[")
            newcomer = record("worker-1")
            await owner.register(newcomer)
            await follower.until(mine, newcomer)
            assert follower.sets == [(mine,), (mine, newcomer)]
    skipped = [log["key"] for log in logs if log["event"] == "worker record skipped"]
    assert skipped == [f"{prefix}worker-9/1", f"{prefix}?"]


async def test_namespaces_do_not_see_each_other(
    shared_server: EtcdServer, processes: Processes, namespace: str
) -> None:
    blue, green = f"{namespace}-blue", f"{namespace}-green"
    mine = record("worker-0")
    await processes.one(shared_server.url, namespace=blue).register(mine)
    async with following(processes.one(shared_server.url, namespace=blue), mine):
        pass
    for other in (green, namespace):
        async with watching(processes.one(shared_server.url, namespace=other)) as watch:
            assert await soon(anext(watch)) == ()


async def test_close_leaves_no_key_lease_task_or_thread(server: EtcdServer) -> None:
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    discovery = EtcdDiscovery(server.url, ttl_s=TTL_S)
    await discovery.register(record("worker-0"))
    await discovery.register(record("worker-1"))
    async with watching(discovery) as watch:
        await soon(anext(watch))
    async with admin(server) as operator:
        assert (len(await operator.keys()), await operator.leases()) == (2, 2)
        await soon(discovery.close())
        await soon(discovery.close())
        assert (await operator.keys(), await operator.leases()) == ([], 0)
    assert asyncio.all_tasks() == tasks
    gc.collect()  # gRPC's thread ends with its last channel
    assert set(threading.enumerate()) <= threads


async def test_register_and_update_after_close_are_refused(
    shared_server: EtcdServer, processes: Processes, namespace: str
) -> None:
    owner = processes.one(shared_server.url, namespace=namespace)
    lease = await owner.register(record("worker-0"))
    with pytest.raises(ConfigError, match="cannot take the record of worker-1"):
        await lease.update(record("worker-1"))
    await lease.close()
    with pytest.raises(ConfigError, match="closed"):
        await lease.update(lease._record)
    await owner.close()
    with pytest.raises(ConfigError, match="closed"):
        await owner.register(record("worker-1"))

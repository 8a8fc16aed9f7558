"""What discovery on etcd does beyond the contract: etcd that stands still, dies, forgets, refuses."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from structlog.testing import capture_logs

from tests.contract.certificates import Authority, authority
from tests.contract.etcd import Admin, EtcdServer, admin, etcd_server, free_ports
from tests.contract.planes import record, soon, watching
from trtllm_workers.config.outside import EtcdLogin, EtcdUrl, TlsFiles
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.base import Lease
from trtllm_workers.planes.discovery import cluster_secret
from trtllm_workers.planes.discovery_etcd import EtcdDiscovery
from trtllm_workers.planes.etcd_client import EtcdClient
from trtllm_workers.planes.etcd_errors import Compacted
from trtllm_workers.planes.etcd_secret import secret_on_etcd
from trtllm_workers.planes.record_keys import record_key, secret_key, workers_prefix
from trtllm_workers.types import WorkerRecord, WorkerState

TTL_S = 1.0  # etcd counts in whole seconds
LONGER_THAN_A_LEASE_S = 1.8  # etcd looks for leases that have run out every half second
Logs = list[MutableMapping[str, Any]]
_namespaces = itertools.count()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """A server that no test disturbs; each test has a namespace of its own."""
    with etcd_server(tmp_path_factory.mktemp("etcd")) as made:
        yield made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    """A server of this test alone."""
    with etcd_server(tmp_path / "etcd") as made:
        yield made


@pytest.fixture
def namespace() -> str:
    return f"test-{next(_namespaces)}"


class Processes:
    """Discovery as several processes see it; all are closed in the end."""

    def __init__(self) -> None:
        self._made: list[EtcdDiscovery] = []

    def one(
        self,
        *urls: EtcdUrl,
        namespace: str = "default",
        connect_timeout_s: float = 5.0,
        **login: Any,
    ) -> EtcdDiscovery:
        url = EtcdUrl(tuple(each.endpoints[0] for each in urls), urls[0].tls)
        made = EtcdDiscovery(
            url, namespace, EtcdLogin(**login), ttl_s=TTL_S, connect_timeout_s=connect_timeout_s
        )
        self._made.append(made)
        return made

    async def close(self) -> None:
        await soon(asyncio.gather(*(each.close() for each in self._made)))


@pytest.fixture
async def processes() -> AsyncIterator[Processes]:
    made = Processes()
    yield made
    await made.close()


class Follower:
    """Reads a watch in the background and keeps every set that it yielded."""

    def __init__(self) -> None:
        self.sets: list[tuple[WorkerRecord, ...]] = []
        self.moments: list[float] = []
        self._more = asyncio.Event()

    async def read(self, discovery: EtcdDiscovery) -> None:
        async for records in discovery.watch():
            self.sets.append(records)
            self.moments.append(time.monotonic())
            self._more.set()

    async def until(self, *records: WorkerRecord) -> None:
        async def wait() -> None:
            while not self.sets or self.sets[-1] != records:
                self._more.clear()
                await self._more.wait()

        await soon(wait())

    async def stays(self, *records: WorkerRecord, for_s: float = LONGER_THAN_A_LEASE_S) -> None:
        """Check that this is the set, and that no other one comes for so long."""
        assert self.sets[-1] == records
        self._more.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(for_s):
                await self._more.wait()
        assert self.sets[-1] == records


@contextlib.asynccontextmanager
async def following(discovery: EtcdDiscovery, *begin: WorkerRecord) -> AsyncIterator[Follower]:
    follower = Follower()
    reading = asyncio.create_task(follower.read(discovery))
    try:
        await follower.until(*begin)
        yield follower
    finally:
        reading.cancel()
        await asyncio.wait({reading})


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


# A watcher alone loses its connection


class Relay:
    """A way to etcd that can be cut."""

    def __init__(self, server: EtcdServer) -> None:
        self._server = server
        self._listening: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        (self.port,) = free_ports(1)
        self.url = EtcdUrl((("127.0.0.1", self.port),), tls=False)

    async def open(self) -> None:
        self._listening = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Break every connection; nobody listens any more."""
        assert self._listening is not None
        self._listening.close()
        for writer in self._writers:
            writer.transport.abort()
        if self._tasks:
            await soon(asyncio.wait(self._tasks))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._tasks.add(task)
        there, back = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers |= {writer, back}
        try:
            await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))
        finally:
            self._writers -= {writer, back}
            self._tasks.discard(task)
            writer.close()
            back.close()


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(65536):
            sink.write(piece)
        sink.close()


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


@pytest.fixture
async def operator(shared_server: EtcdServer) -> AsyncIterator[Admin]:
    async with admin(shared_server) as made:
        yield made


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
    assert {thread for thread in threading.enumerate() if not thread.daemon} <= threads


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


# The first contact


async def told(discovery: EtcdDiscovery) -> str:
    """Return what register and watch say when they cannot reach etcd; both the same."""
    with pytest.raises(ConfigError) as of_register:
        await soon(discovery.register(record("worker-0")))
    async with watching(discovery) as watch:
        with pytest.raises(ConfigError) as of_watch:
            await soon(anext(watch))
    parts = [str(caught.value).partition("tried for")[0] for caught in (of_register, of_watch)]
    assert parts[0] == parts[1]
    return str(of_register.value)


async def test_nobody_listening_names_every_member_and_its_cause(processes: Processes) -> None:
    one, other = (EtcdUrl((("127.0.0.1", port),), tls=False) for port in free_ports(2))
    unknown = EtcdUrl((("no-such-host.invalid", 2379),), tls=False)
    words = await told(processes.one(one, other, unknown, connect_timeout_s=0.5))
    for url in (one, other):
        assert f"127.0.0.1:{url.endpoints[0][1]}: connection refused" in words
    assert "no-such-host.invalid:2379: unknown host" in words
    assert "tried for 0.5 s" in words
    assert "--etcd-endpoints" in words


async def test_server_that_does_not_answer_is_told_after_the_deadline(
    processes: Processes,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and that is all
        url = EtcdUrl((("127.0.0.1", silent.getsockname()[1]),), tls=False)
        assert "no answer within 0.25 s" in await told(processes.one(url, connect_timeout_s=0.6))


# Who may


ROOT, ANN = EtcdLogin("root", "secret"), EtcdLogin("ann", "pass")


@pytest.fixture
async def guarded(server: EtcdServer) -> EtcdServer:
    async with admin(server) as operator:
        await operator.enable_auth(root="secret", ann="pass", bob="word")
    return server


async def test_user_with_a_password_gets_in_and_stays_in(
    guarded: EtcdServer, processes: Processes
) -> None:
    stays, newcomer = record("stays"), record("newcomer")
    owner = processes.one(guarded.url, username="ann", password="pass")
    await owner.register(stays)
    watcher = processes.one(guarded.url, username="bob", password="word")
    async with following(watcher, stays) as follower:
        guarded.kill()  # it forgets every token it has given
        await asyncio.to_thread(guarded.start)
        await follower.stays(stays)
        await owner.register(newcomer)
        await follower.until(newcomer, stays)


async def test_token_that_has_run_out_is_replaced(guarded: EtcdServer) -> None:
    client = EtcdClient(guarded.url, ANN)
    key = "/trtllm-launch/x"
    assert await soon(client.put_if_absent(key, b"1")) == b"1"
    assert client._session is not None
    client._session.token = (("token", "ran.out"),)
    assert await soon(client.get(key)) == b"1"
    await client.close()


WRONG_LOGINS = {
    "wrong password": (EtcdLogin("ann", "nope"), "user 'ann' or its password is wrong"),
    "unknown user": (EtcdLogin("eve", "nope"), "user 'eve' or its password is wrong"),
    "no user": (EtcdLogin(), "it asks for a user; give --etcd-username"),
}


async def test_wrong_login_is_told_at_once(guarded: EtcdServer, processes: Processes) -> None:
    for login, words in WRONG_LOGINS.values():
        began_s = time.monotonic()
        discovery = processes.one(
            guarded.url,
            username=login.username,
            password=login.password,
            connect_timeout_s=9.0,
        )
        assert words in await told(discovery)
        assert time.monotonic() - began_s < 3
    with pytest.raises(ConfigError, match=r"no permission.*grant-permission"):
        async with admin(guarded, ANN) as ann:
            await ann.client.insist(lambda: ann.client.put_if_absent("/else", b""), 9.0)


async def test_login_where_etcd_asks_for_none_does_no_harm(
    shared_server: EtcdServer, processes: Processes, namespace: str
) -> None:
    owner = processes.one(shared_server.url, namespace=namespace, username="x", password="y")
    await owner.register(record("worker-0"))


# TLS


@pytest.fixture(scope="module")
def etcd_files(cluster_authority: Authority) -> TlsFiles:
    return cluster_authority.signs("etcd")


async def test_etcd_with_tls(
    tmp_path: Path, etcd_files: TlsFiles, cluster_authority: Authority, processes: Processes
) -> None:
    mine = record("worker-0")
    client = cluster_authority.signs("client")
    with etcd_server(tmp_path / "etcd", etcd_files) as server:
        await processes.one(server.url, tls=client).register(mine)
        async with following(processes.one(server.url, tls=client), mine):
            pass
        strangers = authority(tmp_path / "other")
        refused = {
            "no certificate of ours": TlsFiles(ca=client.ca),
            "another authority's certificate": dataclasses.replace(
                strangers.signs("stranger"), ca=client.ca
            ),
            "not our authority's server": strangers.signs("trusts others"),
        }
        for files in refused.values():
            words = await told(processes.one(server.url, tls=files, connect_timeout_s=0.5))
            assert "TLS" in words, words
        plain = EtcdUrl(server.url.endpoints, tls=False)
        assert "if it wants TLS" in await told(processes.one(plain, connect_timeout_s=0.5))
        await processes.close()


async def test_tls_to_a_server_without_it_says_so(
    shared_server: EtcdServer, etcd_files: TlsFiles, processes: Processes
) -> None:
    url = EtcdUrl(shared_server.url.endpoints, tls=True)
    words = await told(processes.one(url, tls=etcd_files, connect_timeout_s=0.5))
    assert "it answers without TLS" in words


# The secret


async def test_ten_processes_that_start_together_end_with_one_secret(
    shared_server: EtcdServer, namespace: str, operator: Admin
) -> None:
    secrets = await soon(
        asyncio.gather(
            *(secret_on_etcd(shared_server.url, namespace, EtcdLogin(), 10.0) for _ in range(10))
        )
    )
    assert len(set(secrets)) == 1
    assert len(secrets[0]) == 64
    assert await operator.client.get(secret_key(namespace)) == secrets[0]


def test_secret_is_kept_for_those_who_come_later(shared_server: EtcdServer, namespace: str) -> None:
    url = str(shared_server.url)
    assert cluster_secret(url, "given by hand", namespace) == b"given by hand"
    first = cluster_secret(url, None, namespace)
    assert cluster_secret(url, None, namespace) == first
    assert cluster_secret(url, None, f"{namespace}-other") != first


async def test_key_that_holds_no_secret_is_refused(
    shared_server: EtcdServer, namespace: str, operator: Admin
) -> None:
    await operator.put(secret_key(namespace), b"short")
    with pytest.raises(ConfigError, match=f"etcdctl del '/trtllm-launch/{namespace}/secret'"):
        await soon(secret_on_etcd(shared_server.url, namespace, EtcdLogin(), 10.0))

"""Getting into etcd: members that are not there, users and passwords, TLS, and the cluster secret."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from pathlib import Path

import pytest

from tests.contract.certificates import Authority, authority
from tests.contract.etcd import Admin, EtcdServer, admin, etcd_server, free_ports
from tests.contract.etcd_watchers import Processes, following
from tests.contract.planes import record, soon, watching
from trtllm_workers.config.outside import EtcdLogin, EtcdUrl, TlsFiles
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes.discovery import cluster_secret
from trtllm_workers.planes.discovery_etcd import EtcdDiscovery
from trtllm_workers.planes.etcd_client import EtcdClient
from trtllm_workers.planes.etcd_secret import secret_on_etcd
from trtllm_workers.planes.record_keys import secret_key

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

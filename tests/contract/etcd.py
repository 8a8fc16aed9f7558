"""Real etcd servers for the suites of discovery: on free ports, in a folder of the test's own."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.config.outside import EtcdLogin, EtcdUrl, TlsFiles
from trtllm_workers.planes.etcd_client import EtcdClient

PROGRAM = shutil.which("etcd")
START_DEADLINE_S = 15.0
_PORT_ATTEMPTS = 5


def needs_etcd() -> None:
    """Skip the test where the program is missing."""
    if PROGRAM is None:
        pytest.skip("there is no etcd; install it: apt-get install etcd-server")


class EtcdServer:
    """One etcd process. ``tls``: serve with these files, and ask clients for a certificate of ``ca``.

    ``members``: the servers of its cluster by name, itself among them, once they all have ports.
    """

    def __init__(self, folder: Path, tls: TlsFiles | None = None, name: str = "default") -> None:
        self.folder = folder
        self.name = name
        self.members: list[EtcdServer] = [self]
        self.scheme = "http" if tls is None else "https"
        self._tls = tls
        self.port = 0
        self.peer_port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begin = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> EtcdUrl:
        return EtcdUrl((("127.0.0.1", self.port),), self._tls is not None)

    def start(self) -> None:
        """Start, or start again with the same ports and whatever is in the data folder."""
        for _ in range(_PORT_ATTEMPTS):
            if not self.port:
                self.port, self.peer_port = free_ports(2)
            self.launch()
            if self.is_ready():
                return
            if (self.folder / "data").exists():
                break  # its ports are known to others
            self.port = 0
        pytest.fail(f"etcd did not start:\n{self.log()[-2000:]}")

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def kill(self) -> None:
        """End it without a word."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(timeout=10)
            self._process = None

    def stop(self) -> None:
        """Let it stand still; what is sent to it waits."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def forget(self) -> None:
        """Delete the data of a server that does not run."""
        shutil.rmtree(self.folder / "data")

    def launch(self) -> None:
        """Start the process; ``is_ready`` waits until it serves, or cannot."""
        client = f"{self.scheme}://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{self.peer_port}"
        arguments = {
            "name": self.name,
            "data-dir": str(self.folder / "data"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": ",".join(
                f"{one.name}=http://127.0.0.1:{one.peer_port}" for one in self.members
            ),
            # etcd grants no lease shorter than one and a half election timeouts.
            "heartbeat-interval": "20",
            "election-timeout": "200",
        }
        if self._tls is not None:
            arguments |= {
                "cert-file": str(self._tls.cert),
                "key-file": str(self._tls.key),
                "trusted-ca-file": str(self._tls.ca),
            }
        command = [str(PROGRAM), *(f"--{name}={value}" for name, value in arguments.items())]
        if self._tls is not None:
            command.append("--client-cert-auth")
        with (self.folder / "log").open("ab") as log:
            self._log_begin = log.tell()
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def is_ready(self) -> bool:
        """Wait until the process serves; False when it does not, and then it has ended."""
        assert self._process is not None
        deadline_s = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                return False
            if "ready to serve client requests" in self.log()[self._log_begin :]:
                return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.02)  # etcd tells its readiness in its log only
        self.kill()
        return False


def free_ports(count: int) -> list[int]:
    """Return ports that are free now: etcd cannot be told to take any."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def etcd_server(folder: Path, tls: TlsFiles | None = None) -> Iterator[EtcdServer]:
    """Run one server, and end it however the test goes."""
    needs_etcd()
    server = EtcdServer(folder, tls)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def etcd_cluster(folder: Path, count: int) -> Iterator[list[EtcdServer]]:
    """Run a cluster of several members, and end it however the test goes."""
    needs_etcd()
    for attempt in range(_PORT_ATTEMPTS):
        members = [EtcdServer(folder / f"{attempt}-{i}", name=f"m{i}") for i in range(count)]
        ports = iter(free_ports(2 * count))
        for member in members:
            member.members, member.port, member.peer_port = members, next(ports), next(ports)
        try:
            for member in members:
                member.launch()
            if all(member.is_ready() for member in members):
                yield members
                return
        finally:
            for member in members:
                member.kill()
    pytest.fail(f"the etcd cluster did not start:\n{members[0].log()[-2000:]}")


class Admin:
    """What an operator does with etcdctl, over the client under test."""

    def __init__(self, server: EtcdServer, login: EtcdLogin) -> None:
        self.client = EtcdClient(server.url, login)
        self._rpc = self.client._rpc

    async def call(self, service: str, method: str, request: str, **fields: Any) -> Any:
        return await self.client._call(service, method, getattr(self._rpc, request)(**fields))

    async def compact(self) -> None:
        """Forget every event so far."""
        _, revision = await self.client.read_all("/")
        await self.call("KV", "Compact", "CompactionRequest", revision=revision, physical=True)

    async def put(self, key: str, value: bytes) -> None:
        await self.call("KV", "Put", "PutRequest", key=key.encode(), value=value)

    async def delete(self, key: str) -> None:
        await self.call("KV", "DeleteRange", "DeleteRangeRequest", key=key.encode())

    async def keys(self) -> list[str]:
        return [kept.key for kept in (await self.client.read_all("/"))[0]]

    async def leases(self) -> int:
        return len((await self.call("Lease", "LeaseLeases", "LeaseLeasesRequest")).leases)

    async def enable_auth(self, **users: str) -> None:
        """Ask every client for a user from now on: root, and each may use our keys."""
        rpc = self._rpc
        permission = rpc.Permission(
            permType=rpc.Permission.READWRITE, key=b"/trtllm-launch/", range_end=b"/trtllm-launch0"
        )
        await self.call("Auth", "RoleAdd", "AuthRoleAddRequest", name="launch")
        await self.call(
            "Auth",
            "RoleGrantPermission",
            "AuthRoleGrantPermissionRequest",
            name="launch",
            perm=permission,
        )
        for name, password in users.items():
            await self.call("Auth", "UserAdd", "AuthUserAddRequest", name=name, password=password)
            role = "root" if name == "root" else "launch"
            await self.call(
                "Auth", "UserGrantRole", "AuthUserGrantRoleRequest", user=name, role=role
            )
        await self.call("Auth", "AuthEnable", "AuthEnableRequest")


@contextlib.asynccontextmanager
async def admin(server: EtcdServer, login: EtcdLogin | None = None) -> AsyncIterator[Admin]:
    made = Admin(server, login or EtcdLogin())
    try:
        yield made
    finally:
        await made.client.close()

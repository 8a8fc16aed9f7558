"""Hosts of our own on one machine: network namespaces behind a switch, each with its name. Needs root.

Each has its own interfaces, loopback, ports, host name, ``/etc/hosts`` and boot id, by which programs tell
whether two processes can share memory; the file system is shared. Names ``host1``, ``host2`` … resolve inside.
Nothing of the machine's own network is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.harness import Process

_ETC = Path("/etc/netns")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def why_not() -> str:
    """Return why hosts cannot be made here; "" when they can."""
    if os.geteuid() != 0:
        return "hosts of our own need root"
    if shutil.which("ip") is None:
        return "hosts of our own need the program ip: apt-get install iproute2"
    done = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True)
    if done.returncode:
        return f"network namespaces cannot be made: {done.stderr.decode().strip()}"
    _ip("netns", "del", f"try{os.getpid()}")
    return ""


needs_hosts = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


class Host:
    """One host: ``name`` resolves on all of them, ``address`` is its IPv4 one."""

    def __init__(self, network: Network, index: int) -> None:
        self.name = f"host{index}"
        self.namespace = f"{network.tag}h{index}"
        self.address = f"10.99.0.{index}"
        self.address6 = f"fd99::{index}"
        self.port = f"p{index}"  # its plug at the switch
        self.boot_id = network.folder / self.name

    def argv(self, words: Sequence[str]) -> list[str]:
        """Return what runs a command on this host."""
        # Mounted where nobody else sees it: "ip netns exec" gives each command mounts of its own.
        be = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && hostname "${0##*/}" && exec "$@"'
        named = ["unshare", "--uts", "sh", "-c", be, str(self.boot_id)]
        return ["ip", "netns", "exec", self.namespace, *named, *words]

    def start(self, words: Sequence[str], environ: dict[str, str], cwd: Path) -> Process:
        """Start a command on this host."""
        return Process(self.argv(words), environ, cwd)

    def run(self, words: Sequence[str], environ: dict[str, str], timeout_s: float = 60) -> str:
        """Run a command on this host to its end; return what it printed."""
        done = subprocess.run(
            self.argv(words),
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout


class Network:
    """A switch and its hosts. Use ``network``."""

    def __init__(self, num_hosts: int) -> None:
        self.tag = f"t{os.getpid()}"
        self._switch = f"{self.tag}sw"
        self.folder = Path(tempfile.mkdtemp(prefix=self.tag))
        self.hosts = [Host(self, index) for index in range(1, num_hosts + 1)]

    def make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        for host in self.hosts:
            folder = _ETC / host.namespace
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            host.boot_id.write_text(f"{uuid.uuid4()}\n")
            inside = ("-n", host.namespace)
            _ip("netns", "add", host.namespace)
            _ip(
                *("link", "add", "eth0", "netns", host.namespace, "type", "veth"),
                *("peer", "name", host.port, "netns", self._switch),
            )
            _ip("-n", self._switch, "link", "set", host.port, "master", "switch", "up")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip(*inside, "addr", "add", f"{host.address6}/64", "dev", "eth0", "nodad")
            _ip(*inside, "link", "set", "eth0", "up")

    def plug(self, host: Host, *, into: bool) -> None:
        """Plug a host's cable in or out: with it out, packets are lost without a word."""
        _ip("-n", self._switch, "link", "set", host.port, "up" if into else "down")

    def remove(self) -> None:
        for namespace in (self._switch, *(host.namespace for host in self.hosts)):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
            shutil.rmtree(_ETC / namespace, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            _ETC.rmdir()  # only when it is empty


@contextlib.contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    """Make hosts, and remove them again."""
    made = Network(num_hosts)
    try:
        made.make()
        yield made
    finally:
        made.remove()

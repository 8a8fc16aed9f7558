"""Which address a process tells others; on this host's own network, and on hosts made for the test."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from trtllm_workers.config.interfaces import InterfaceAddress, addresses_of_interfaces
from trtllm_workers.errors import ConfigError
from trtllm_workers.planes import advertise
from trtllm_workers.planes.advertise import advertised_host

V4, V6 = socket.AF_INET, socket.AF_INET6
DEFAULT = "default"


class Kernel:
    """Answers like a kernel: by destination, which address is the source; and who has which address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources: dict[str, str] = {}
        self.interfaces: list[InterfaceAddress] = []
        monkeypatch.setattr(advertise, "_raw_source", self._source)
        monkeypatch.setattr(advertise, "addresses_of_interfaces", lambda: self.interfaces)

    def _source(self, address: str, _port: int, family: int) -> str | None:
        is_family = (":" in address) == (family == V6)
        return (self.sources.get(address) or self.sources.get(DEFAULT)) if is_family else None

    def has(self, interface: str, address: str) -> None:
        family = V6 if ":" in address else V4
        self.interfaces.append(InterfaceAddress(interface, address, family))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


# Given


@pytest.mark.parametrize(
    "given",
    ["node-7", "node_7.rack.example", "10.0.0.7", "fd00::7", "fe80::7%eth0", "a" * 63 + ".example"],
)
@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "127.0.0.1"])
def test_given_host_wins(kernel: Kernel, given: str, listen: str) -> None:
    kernel.sources[DEFAULT] = "10.9.9.9"
    assert advertised_host(listen, given) == given


WRONG = {
    "": "no host name, address or interface",
    "a b": "no host name",
    "node:7000": "without port and brackets",
    "[fd00::7]": "without port and brackets",
    "http://node": "no host name",
    "-node": "no host name",
    "10.0.0": "no host name",
    "10.0.0.300": "no host name",
    "x" * 300: "no host name",
    "0.0.0.0": "nobody can connect to 0.0.0.0",
    "::": "nobody can connect to ::",
    "224.0.0.1": "nobody can connect",
    "fe80::7": "link-local and names no interface",
}


@pytest.mark.parametrize(("given", "words"), WRONG.items())
def test_given_host_that_cannot_be_one_is_refused(given: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        advertised_host("0.0.0.0", given)
    assert "--advertise-host" in str(caught.value)


@pytest.fixture
def lo(kernel: Kernel) -> str:
    """The name of an interface that every host has."""
    return socket.if_nameindex()[0][1]


def test_given_interface_stands_for_its_first_global_address(kernel: Kernel, lo: str) -> None:
    kernel.has("other", "10.1.1.1")
    for address in ("127.0.0.1", "169.254.1.1", "10.0.0.7", "10.0.0.8", "fe80::7", "fd00::7"):
        kernel.has(lo, address)
    assert advertised_host("0.0.0.0", lo) == "10.0.0.7"
    assert advertised_host("::", lo) == "fd00::7"
    assert advertised_host("10.0.0.8", lo) == "10.0.0.7"


def test_given_interface_without_an_address_for_others_is_refused(kernel: Kernel, lo: str) -> None:
    for address in ("127.0.0.1", "169.254.1.1", "fd00::7"):
        kernel.has(lo, address)
    with pytest.raises(ConfigError, match=rf"interface {lo} has no IPv4 .*only fd00::7"):
        advertised_host("0.0.0.0", lo)


# Listening


@pytest.mark.parametrize("listen", ["127.0.0.1", "10.0.0.7", "fd00::7", "localhost", "node-7"])
def test_listening_on_one_address_advertises_it(kernel: Kernel, listen: str) -> None:
    kernel.sources[DEFAULT] = "10.9.9.9"
    assert advertised_host(listen, None, [("10.0.0.1", 2379)]) == listen


def test_way_to_the_first_server_that_has_a_route_decides(kernel: Kernel) -> None:
    kernel.sources = {"10.2.0.1": "10.2.0.7", "10.3.0.1": "10.3.0.7"}
    toward = [("10.1.0.1", 2379), ("10.2.0.1", 2379), ("10.3.0.1", 4222)]
    assert advertised_host("0.0.0.0", None, toward) == "10.2.0.7"


@pytest.mark.parametrize("useless", ["127.0.0.1", "169.254.3.3"])
def test_way_that_others_cannot_take_is_passed_over(kernel: Kernel, useless: str) -> None:
    kernel.sources = {"10.1.0.1": useless, "10.2.0.1": "10.2.0.7"}
    assert advertised_host("0.0.0.0", None, [("10.1.0.1", 1), ("10.2.0.1", 1)]) == "10.2.0.7"


def test_server_of_the_other_family_does_not_decide(kernel: Kernel) -> None:
    kernel.sources = {"fd00::1": "fd00::7", "10.2.0.1": "10.2.0.7"}
    toward = [("fd00::1", 2379), ("10.2.0.1", 2379)]
    assert advertised_host("0.0.0.0", None, toward) == "10.2.0.7"
    assert advertised_host("::", None, toward) == "fd00::7"


def test_default_route_decides_without_servers(kernel: Kernel) -> None:
    kernel.sources[DEFAULT] = "10.9.9.9"
    kernel.has("eth1", "10.1.1.1")
    assert advertised_host("0.0.0.0", None) == "10.9.9.9"
    assert advertised_host("", None) == "10.9.9.9"


@pytest.mark.parametrize("of_containers", ["docker0", "br-12ab", "veth1", "virbr0", "cni0"])
def test_interface_of_containers_comes_last(kernel: Kernel, of_containers: str) -> None:
    kernel.has("lo", "127.0.0.1")
    kernel.has(of_containers, "172.17.0.1")
    kernel.has("eth0", "169.254.0.7")
    kernel.has("eth1", "10.0.0.7")
    assert advertised_host("0.0.0.0", None) == "10.0.0.7"


def test_host_without_any_network_advertises_loopback(kernel: Kernel) -> None:
    kernel.has("lo", "127.0.0.1")
    assert advertised_host("0.0.0.0", None) == "127.0.0.1"
    assert advertised_host("::", None) == "::1"


def test_name_that_is_not_found_is_passed_over(kernel: Kernel) -> None:
    kernel.sources["10.2.0.1"] = "10.2.0.7"
    toward = [("no host", 2379), ("\udc80", 1), ("10.2.0.1", 2379)]
    assert advertised_host("0.0.0.0", None, toward) == "10.2.0.7"


def test_resolver_that_hangs_holds_up_for_a_bounded_time(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.sources |= {"10.1.0.1": "10.1.0.7", DEFAULT: "10.9.9.9"}
    answered = threading.Event()
    look_up = socket.getaddrinfo

    def hang(host: str, *rest: int) -> object:
        if host == "hangs":
            answered.wait(30)
        return look_up(host, *rest)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(advertise, "_LOOKUP_TIMEOUT_S", 0.05)
    began_s = time.monotonic()
    try:
        assert advertised_host("0.0.0.0", None, [("hangs", 1)]) == "10.9.9.9"
        assert advertised_host("0.0.0.0", None, [("10.1.0.1", 1), ("hangs", 1)]) == "10.1.0.7"
    finally:
        answered.set()
    assert time.monotonic() - began_s < 5


# This host


def test_kernel_tells_the_addresses_of_this_host() -> None:
    found = addresses_of_interfaces()
    assert InterfaceAddress("lo", "127.0.0.1", V4) in found
    names = {name for _, name in socket.if_nameindex()}
    assert {one.interface for one in found} <= names


def test_advertised_address_is_one_of_this_host() -> None:
    mine = {one.address for one in addresses_of_interfaces()}
    assert advertised_host("0.0.0.0", None) in mine


# A host with two networks

Run = Callable[[Sequence[str]], str]
HOST = "trtllm-advertise-test"
NETWORK = """
link set lo up
link add docker0 type veth peer name far0
addr add 172.17.0.1/16 dev docker0
link add front type veth peer name far1
addr add 10.1.0.7/24 dev front
addr add fd01::7/64 dev front nodad
link add back type veth peer name far2
addr add 10.2.0.7/24 dev back
addr add 10.2.0.8/24 dev back
addr add fd02::7/64 dev back nodad
link set docker0 up
link set far0 up
link set front up
link set far1 up
link set back up
link set far2 up
"""
ASK = """
import json, sys
from trtllm_workers.planes.advertise import advertised_host
print(json.dumps([advertised_host(*question) for question in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def host() -> Iterator[Callable[..., list[str]]]:
    """A network namespace with two networks, IPv6 and Docker's bridge; asks there."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the ip program: apt-get install iproute2")
    name = f"{HOST}-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10)
    if made.returncode != 0:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")

    def ip(line: str) -> None:
        subprocess.run(["ip", "-n", name, *line.split()], check=True, timeout=10)

    def ask(*questions: Sequence[object], routes: Sequence[str] = ()) -> list[str]:
        for route in routes:
            ip(f"route add {route}")
        done = subprocess.run(
            ["ip", "netns", "exec", name, sys.executable, "-c", ASK, json.dumps(questions)],
            capture_output=True,
            text=True,
            timeout=30,
            cwd=Path(__file__).parents[2],
        )
        assert done.returncode == 0, done.stderr
        answers: list[str] = json.loads(done.stdout)
        return answers

    try:
        for line in NETWORK.strip().splitlines():
            ip(line)
        yield ask
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)


def test_host_with_two_networks_and_ipv6(host: Callable[..., list[str]]) -> None:
    front, back = ("10.1.0.1", 2379), ("10.2.0.1", 2379)
    assert host(
        ["0.0.0.0", None, [back, front]],
        ["0.0.0.0", None, [["10.9.0.1", 2379], front]],  # no route to the first
        ["0.0.0.0", None, [["10.2.0.8", 2379]]],  # etcd runs here
        ["0.0.0.0", None, [["127.0.0.1", 2379], back]],
        ["::", None, [["fd02::1", 2379]]],
        ["0.0.0.0", "back"],
        ["::", "back"],
        ["0.0.0.0", None],  # no default route: docker0 has the first address, and is not taken
    ) == [
        "10.2.0.7",
        "10.1.0.7",
        "10.2.0.7",  # its first address there
        "10.2.0.7",
        "fd02::7",
        "10.2.0.7",
        "fd02::7",
        "10.1.0.7",
    ]
    assert host(
        ["0.0.0.0", None],
        ["::", None],
        routes=["default via 10.2.0.1", "default via fd02::1"],
    ) == ["10.2.0.7", "fd02::7"]

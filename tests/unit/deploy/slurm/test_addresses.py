"""The address by which other nodes reach this one: chosen, checked, handed on in a file."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trtllm_workers.config.interfaces import InterfaceAddress
from trtllm_workers.deploy.slurm import addresses
from trtllm_workers.deploy.slurm.addresses import (
    candidates,
    choose,
    main,
    read_answer,
    usable,
    write_answer,
)
from trtllm_workers.errors import ConfigError, StartError
from trtllm_workers.planes import advertise

INTERFACES = [
    ("lo", "127.0.0.1"),
    ("docker0", "172.17.0.1"),
    ("eth0", "10.1.0.5"),
    ("ib0", "10.2.0.5"),
    ("lo", "::1"),
    ("eth0", "fe80::5"),
    ("eth0", "fd00::5"),
]
NAMES = {"n5": ["10.2.0.5"], "n5-alias": ["127.0.1.1", "10.1.0.5"], "n9": ["10.1.0.9"]}


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A node with several networks; the kernel's default route goes out of eth0."""
    has = list(INTERFACES)

    def found() -> list[InterfaceAddress]:
        return [
            InterfaceAddress(name, text, socket.AF_INET6 if ":" in text else socket.AF_INET)
            for name, text in has
        ]

    def source(_address: str, _port: int, family: int) -> str | None:
        wanted = "10.1.0.5" if family == socket.AF_INET else "fd00::5"
        return wanted if ("eth0", wanted) in has else None

    def lookup(toward: list[tuple[str, int]], _family: int) -> list[tuple[str, int]]:
        return [(one, port) for name, port in toward for one in NAMES.get(name, [])]

    monkeypatch.setattr(advertise, "addresses_of_interfaces", found)
    monkeypatch.setattr(addresses, "addresses_of_interfaces", found)
    monkeypatch.setattr(advertise, "_raw_source", source)
    monkeypatch.setattr(addresses, "looked_up", lookup)
    monkeypatch.setattr(socket, "gethostname", lambda: "n5")
    monkeypatch.setattr(
        socket, "if_nameindex", lambda: list(enumerate(sorted({n for n, _ in has})))
    )
    return has


@pytest.mark.parametrize("text", ["10.1.0.5", "192.168.7.1", "fd00::5", "2001:db8::1", "8.8.8.8"])
def test_an_address_that_others_reach_is_usable(text: str) -> None:
    assert str(usable(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "127.0.1.1", "::1", "169.254.3.4", "fe80::1", "fe80::1%eth0"),
        *("0.0.0.0", "::", "224.0.0.1", "ff02::1", "", " 10.1.0.5", "10.1.0.5\n"),
        *("10.1.0.5 10.2.0.5", "10.1.0.5:8000", "[fd00::5]", "n5", "010.1.0.5"),
        "srun: error: Unable to create step for job 719: Job/step already completing",
    ],
)
def test_what_others_cannot_connect_to_is_not_usable(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no IP address|no address that other nodes"):
        usable(text)


def test_candidates_leave_out_loopback_and_put_networks_of_containers_last() -> None:
    assert candidates() == ("10.1.0.5", "10.2.0.5", "fd00::5", "172.17.0.1")


@pytest.mark.parametrize(
    ("given", "node_addr", "address", "because"),
    [
        ("10.2.0.5", "n5", "10.2.0.5", "10.2.0.5 was given"),
        ("10.7.7.7", None, "10.7.7.7", "10.7.7.7 was given"),  # behind a translation: not local
        ("ib0", None, "10.2.0.5", "ib0 was given"),
        ("n5-alias", None, "10.1.0.5", "n5-alias was given"),
        (None, "n5", "10.2.0.5", "SLURM knows this node as n5"),
        (None, "n5-alias", "10.1.0.5", "SLURM knows this node as n5-alias"),
        (None, "n9", "10.1.0.5", "it is the first that others may reach"),  # another host's
        (None, "unknown", "10.1.0.5", "it is the first that others may reach"),
        (None, None, "10.1.0.5", "it is the first that others may reach"),
    ],
)
def test_the_given_address_wins_then_slurms_then_the_first(
    given: str | None, node_addr: str | None, address: str, because: str
) -> None:
    found = choose(given, node_addr)
    assert (found.host, found.address, found.because) == ("n5", address, because)
    assert address not in found.candidates


def test_a_node_with_ipv6_alone_has_an_address(node: list[tuple[str, str]]) -> None:
    node[:] = [("lo", "127.0.0.1"), ("eth0", "fd00::5")]
    assert choose().address == "fd00::5"


@pytest.mark.parametrize("given", ["127.0.0.1", "lo", "n10", "a b", "srun: error", "fe80::1%eth0"])
def test_a_given_address_that_is_of_no_use_is_refused(given: str) -> None:
    with pytest.raises(ConfigError):
        choose(given, "n5")


def test_a_node_without_an_address_is_an_error_with_the_remedy(node: list[tuple[str, str]]) -> None:
    node[:] = [("lo", "127.0.0.1"), ("eth0", "fe80::5")]
    with pytest.raises(StartError, match=r"n5 has no address .*HEAD_NODE_IP, or --advertise-host"):
        choose()


def test_the_answer_travels_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "head.json"
    write_answer(path, None, "n5")
    assert read_answer(path) == choose(None, "n5")
    assert list(tmp_path.iterdir()) == [path]


def test_an_answer_that_is_not_there_yet_can_be_waited_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_answer(tmp_path / "head.json")


def test_a_node_that_finds_no_address_says_so_in_the_file(
    tmp_path: Path, node: list[tuple[str, str]]
) -> None:
    node.clear()
    write_answer(tmp_path / "head.json")
    with pytest.raises(StartError, match="node n5: n5 has no address"):
        read_answer(tmp_path / "head.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "srun: error: timed out\n10.1.0.5\n",
        '{"host": "n5"}',
        '{"host": "n5", "address": "127.0.0.1"}',
        '{"host": "n5", "address": "10.1.0.5 10.2.0.5"}',
    ],
)
def test_a_file_without_one_good_address_is_refused_and_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "head.json"
    path.write_text(text)
    with pytest.raises(StartError, match=r"head\.json: this should be the address of a node"):
        read_answer(path)


def test_the_command_takes_flags_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "head.json"
    monkeypatch.delenv("HEAD_NODE_IP", raising=False)
    monkeypatch.setenv("SLURMD_NODENAME", "n5")
    main([str(path)])
    assert read_answer(path).address == "10.2.0.5"
    monkeypatch.setenv("HEAD_NODE_IP", "10.3.0.5")
    main([str(path)])
    assert read_answer(path).address == "10.3.0.5"
    main([str(path), "--advertise-host", "10.4.0.5"])
    assert read_answer(path).address == "10.4.0.5"


def test_the_command_runs_as_a_module_and_prints_nothing(tmp_path: Path) -> None:
    path = tmp_path / "head.json"
    words = ["trtllm_workers.deploy.slurm.addresses", str(path), "--advertise-host", "10.3.0.5"]
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert json.loads(path.read_text())["address"] == "10.3.0.5"

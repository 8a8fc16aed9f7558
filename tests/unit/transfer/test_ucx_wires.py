"""Which wires UCX may use, from what the operator set and from our address."""

from __future__ import annotations

import socket

import pytest

from trtllm_workers.config.interfaces import InterfaceAddress
from trtllm_workers.transfer.ucx_wires import EVERYTHING, Wires, choose_wires

INTERFACES = [
    InterfaceAddress("lo", "127.0.0.1", socket.AF_INET),
    InterfaceAddress("docker0", "172.17.0.1", socket.AF_INET),
    InterfaceAddress("eth0", "10.0.0.5", socket.AF_INET),
    InterfaceAddress("ib0", "10.1.0.5", socket.AF_INET),
    InterfaceAddress("eth0", "fd00::5", socket.AF_INET6),
]


def chosen(
    tls: str = EVERYTHING, devices: str = EVERYTHING, address: str = "10.0.0.5", host: str = ""
) -> Wires:
    return choose_wires(tls, devices, host or address, [address], INTERFACES)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_a_loopback_host_uses_no_network(host: str) -> None:
    wires = chosen(host=host)
    assert wires.messages is None
    assert wires.one_sided["TLS"] == "sysv,self"


@pytest.mark.parametrize(
    ("tls", "one_sided", "with_tcp"),
    [
        ("all", "^tcp", True),
        ("sysv,all", "^tcp", True),
        ("tcp", "self", True),
        ("\\tcp,self", "self", True),
        ("rc,sm,tcp", "rc,sm", True),
        ("rc,sm", "rc,sm", False),
        ("^tcp", "^tcp", False),
        ("^ud,tcp", "^ud,tcp", False),
        ("^ud", "^ud,tcp", True),
    ],
)
def test_one_sided_wires_never_have_tcp_and_messages_need_it_allowed(
    tls: str, one_sided: str, with_tcp: bool
) -> None:
    wires = chosen(tls=tls)
    assert wires.one_sided["TLS"] == one_sided
    assert (wires.messages or {}).get("TLS") == ("tcp" if with_tcp else None)


@pytest.mark.parametrize(
    ("address", "device", "first"),
    [
        ("10.0.0.5", "eth0", "inet,inet6"),
        ("10.1.0.5", "ib0", "inet,inet6"),
        ("fd00::5", "eth0", "inet6,inet"),
    ],
)
def test_the_interface_is_that_of_our_address(address: str, device: str, first: str) -> None:
    messages = chosen(address=address).messages
    assert messages is not None
    assert (messages["NET_DEVICES"], messages["TCP_AF_PRIO"]) == (device, first)
    assert "NET_DEVICES" not in chosen(address=address).one_sided


def test_a_name_is_the_interface_of_what_it_means() -> None:
    wires = choose_wires(
        EVERYTHING, EVERYTHING, "node7", ["203.0.113.9", "10.1.0.5", "10.0.0.5"], INTERFACES
    )
    assert wires.messages is not None
    assert wires.messages["NET_DEVICES"] == "ib0"


def test_devices_of_the_operator_stay() -> None:
    messages = chosen(devices="docker0").messages
    assert messages is not None
    assert "NET_DEVICES" not in messages
    assert "TCP_AF_PRIO" not in messages


def test_an_address_of_no_interface_leaves_the_choice_to_ucx() -> None:
    messages = chosen(address="203.0.113.9").messages
    assert messages is not None
    assert "NET_DEVICES" not in messages

"""The addresses of this host's network interfaces, as the kernel tells them. Linux; else none."""

from __future__ import annotations

import array
import ipaddress
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SIOCGIFCONF: Final = 0x8912
_IFREQ_BYTES: Final = struct.calcsize("16s24x")
_MAX_INTERFACES: Final = 4096
_IF_INET6: Final = Path("/proc/net/if_inet6")
_UNUSABLE: Final = 0x40 | 0x20 | 0x08  # tentative, deprecated, failed its check for duplicates
# What Docker, podman, Kubernetes' networks, libvirt and LXC call what they make.
_OF_CONTAINERS: Final = re.compile(
    r"(docker|br-|veth|virbr|cni|flannel|cali|cilium|podman|lxc|lxd|vnet|vmnet|kube|nodelocal|tun|tap)"
)


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """One address of one interface."""

    interface: str
    address: str
    family: int

    @property
    def is_of_containers(self) -> bool:
        """Whether the interface's name is one that only guests of this host can be behind."""
        return bool(_OF_CONTAINERS.match(self.interface))


def addresses_of_interfaces() -> list[InterfaceAddress]:
    """Return all usable addresses, IPv4 first, in the kernel's order."""
    return [*_ipv4(), *_ipv6()]


def _ipv4() -> list[InterfaceAddress]:
    try:
        import fcntl
    except ImportError:  # no Unix
        return []
    room = array.array("B", bytes(_IFREQ_BYTES * _MAX_INTERFACES))
    where, _ = room.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFCONF, struct.pack("iL", len(room), where))
        except OSError:
            return []
    length, _ = struct.unpack("iL", answer)
    entries = (room[at : at + _IFREQ_BYTES].tobytes() for at in range(0, length, _IFREQ_BYTES))
    return [
        # A second address may have a label, "eth0:1"; the interface is what stands before it.
        InterfaceAddress(
            entry[:16].rstrip(b"\0").decode(errors="replace").partition(":")[0],
            socket.inet_ntoa(entry[20:24]),
            socket.AF_INET,
        )
        for entry in entries
    ]


def _ipv6() -> list[InterfaceAddress]:
    try:
        lines = _IF_INET6.read_text().splitlines()
    except OSError:  # no IPv6, or no Linux
        return []
    found = []
    for line in lines:
        digits, _index, _prefix, _scope, flags, interface = line.split()
        if not int(flags, 16) & _UNUSABLE:
            address = str(ipaddress.IPv6Address(int(digits, 16)))
            found.append(InterfaceAddress(interface, address, socket.AF_INET6))
    return found

"""By which address the other nodes of a job reach this one."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import closing

from trtllm_workers.planes.advertise import advertised_host

_EVERY = "0.0.0.0"


def own_address(here: Mapping[str, str], interface: str | None) -> str:
    """Return this node's address: of ``interface``, else the one SLURM knows it by, else the default route's.

    Raises ConfigError for an interface that is not here or has no address.
    """
    if interface:
        return advertised_host(_EVERY, interface)
    name = here.get("SLURMD_NODENAME", "")
    for address in _addresses_of(name):
        if _is_ours(address):
            return address
    return advertised_host(_EVERY, None)


def _addresses_of(name: str) -> list[str]:
    """Return what a node's name stands for, without loopback: Debian's /etc/hosts says 127.0.1.1."""
    if not name:
        return []
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = [str(one[4][0]) for one in found]
    return [one for one in addresses if not one.startswith("127.")]


def _is_ours(address: str) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True

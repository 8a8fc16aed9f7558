"""Which UCX options let which wire carry bytes: decided here, from names alone. Calls nothing of UCX.

Two wires never share a UCX context. *One-sided* (shared memory, RDMA) may not use UCX's tcp: there UCX
1.21 ends an owner's process when a reader's connection breaks while gets are being answered. *Messages*
use nothing but tcp.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trtllm_workers.config.interfaces import InterfaceAddress

EVERYTHING: Final = "all"  # UCX's default of TLS and of NET_DEVICES
_TCP: Final = frozenset({"tcp", "\\tcp"})
# Until an owner notices that a reader died in the middle of an answer, its worker has something to send
# and cannot sleep; UCX would look only every 20 s.
_ALL_WIRES: Final = {"KEEPALIVE_INTERVAL": "1s"}
# Shared memory counts as able to report dead peers only with this, and endpoints ask for it.
_ONE_SIDED: Final = {**_ALL_WIRES, "MM_ERROR_HANDLING": "y"}
# Whole messages only: each one arrives at once or not at all, so that a receipt can be taken back for
# certain, and no answer of UCX's own waits in a queue when a connection breaks.
_MESSAGES: Final = {
    **_ALL_WIRES,
    "RNDV_THRESH": "inf",
    "TCP_TX_SEG_SIZE": "64k",
    "TCP_RX_SEG_SIZE": "64k",
}


@dataclass(frozen=True, slots=True)
class Wires:
    """UCX options by wire. ``messages`` None: nothing goes over the network's TCP."""

    one_sided: Mapping[str, str]
    messages: Mapping[str, str] | None


def is_loopback(host: str) -> bool:
    """Return whether only this host can mean itself by that name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def choose_wires(
    tls: str,
    net_devices: str,
    host: str,
    addresses: Sequence[str],
    interfaces: Sequence[InterfaceAddress],
) -> Wires:
    """Return what may carry bytes.

    ``tls`` and ``net_devices`` are UCX's options as the operator's environment has them; what is set there
    stays as it is. ``host`` is what peers call us, ``addresses`` what that means.
    """
    if is_loopback(host):
        # System V segments vanish with their last user, and containers do not limit them to 64 MiB.
        return Wires({**_ONE_SIDED, "TLS": "sysv,self"}, None)
    one_sided, with_tcp = _without_tcp(tls)
    if not with_tcp:
        return Wires({**_ONE_SIDED, "TLS": one_sided}, None)
    messages = {**_MESSAGES, "TLS": "tcp"}
    if net_devices == EVERYTHING:
        messages |= _device(addresses, interfaces)
    return Wires({**_ONE_SIDED, "TLS": one_sided}, messages)


def _without_tcp(tls: str) -> tuple[str, bool]:
    """Return UCX's list of transports less tcp, and whether tcp was among them."""
    if tls == EVERYTHING:
        return "^tcp", True
    if tls.startswith("^"):
        banned = tls[1:].split(",")
        return (tls, False) if _TCP & set(banned) else (f"{tls},tcp", True)
    names = tls.split(",")
    left = [name for name in names if name not in _TCP]
    if EVERYTHING in left:
        return "^tcp", True
    return ",".join(left) or "self", len(left) < len(names)


def _device(addresses: Sequence[str], interfaces: Sequence[InterfaceAddress]) -> Mapping[str, str]:
    """Return the options that keep UCX to the interface with one of our addresses; empty: unknown.

    Without them UCX tells peers an address of whatever interface it finds first.
    """
    for address in addresses:
        for one in interfaces:
            if one.address == address:
                first = "inet6,inet" if one.family == socket.AF_INET6 else "inet,inet6"
                return {"NET_DEVICES": one.interface, "TCP_AF_PRIO": first}
    return {}

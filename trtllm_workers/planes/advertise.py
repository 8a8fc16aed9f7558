"""Which address others reach this process at. Asks the kernel, and names of hosts; sends nothing."""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from collections.abc import Sequence
from typing import Final

from trtllm_workers.config.interfaces import addresses_of_interfaces
from trtllm_workers.errors import ConfigError

_LOOKUP_TIMEOUT_S: Final = 2.0  # for all names together
_EVERY_ADDRESS: Final = {"": socket.AF_INET, "0.0.0.0": socket.AF_INET, "::": socket.AF_INET6}
# Reserved and never assigned: no network has them, so the default route alone leads there.
_ELSEWHERE: Final = {socket.AF_INET: "240.0.0.1", socket.AF_INET6: "4000::1"}
_LOOPBACK: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
_NAME: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}\.?)+")
_NAME_LIKE_AN_ADDRESS: Final = re.compile(r"[0-9.]+")


def advertised_host(
    listen_host: str, given: str | None, toward: Sequence[tuple[str, int]] = ()
) -> str:
    """Return what others are told to connect to.

    * ``given`` wins: a name, an address, or a network interface of this host, which stands for its
      first global address. It is not looked up: others may know a name that this host does not.
    * Listening on one address: that one.
    * Listening on every address (0.0.0.0, ::): the one, of the same family, that this host reaches
      the first of ``toward`` from (etcd, NATS: the others reach those too); else the default
      route's; else the first of its interfaces, those of containers and virtual machines last;
      else loopback. Loopback and link-local addresses found on the way are passed over.

    Raises ConfigError for a ``given`` that is no name, address or interface, or that nobody can
    connect to. Looks up names for two seconds at most.
    """
    if given is not None:
        return _given(given, _EVERY_ADDRESS.get(listen_host))
    family = _EVERY_ADDRESS.get(listen_host)
    if family is None:
        return listen_host
    for address, port in looked_up(toward, family):
        if source := _source_toward(address, port, family):
            return source
    if source := _source_toward(_ELSEWHERE[family], 9, family):
        return source
    for found in sorted(addresses_of_interfaces(), key=lambda one: one.is_of_containers):
        if found.family == family and is_for_others(found.address):
            return found.address
    return _LOOPBACK[family]


def _given(given: str, family: int | None) -> str:
    try:
        address = ipaddress.ip_address(given)
    except ValueError:
        return _interface_or_name(given, family)
    if address.is_unspecified or address.is_multicast:
        raise ConfigError(
            f"--advertise-host: nobody can connect to {given}; give an address of this host",
            param="advertise_host",
        )
    if (
        isinstance(address, ipaddress.IPv6Address)
        and address.is_link_local
        and not address.scope_id
    ):
        raise ConfigError(
            f"--advertise-host: {given} is link-local and names no interface; give a global address, "
            f"or {given}%INTERFACE where every host's interface is called the same",
            param="advertise_host",
        )
    return given


def _interface_or_name(given: str, family: int | None) -> str:
    interfaces = [name for _, name in socket.if_nameindex()]
    if given in interfaces:
        mine = [one for one in addresses_of_interfaces() if one.interface == given]
        mine = [one for one in mine if is_for_others(one.address)]
        fitting = [one for one in mine if family in (None, one.family)]
        if not fitting:
            raise ConfigError(
                f"--advertise-host: interface {given} has no {_kind(family)} that others can reach"
                + (f", only {', '.join(one.address for one in mine)}" if mine else ""),
                param="advertise_host",
            )
        return fitting[0].address
    if not _NAME.fullmatch(given) or _NAME_LIKE_AN_ADDRESS.fullmatch(given):
        raise ConfigError(
            f"--advertise-host: {given!r} is no host name, address or interface of this host "
            f"({', '.join(interfaces)}); write it without port and brackets",
            param="advertise_host",
        )
    return given


def _kind(family: int | None) -> str:
    if family is None:
        return "address"
    return "IPv4 address" if family == socket.AF_INET else "IPv6 address"


def _source_toward(address: str, port: int, family: int) -> str | None:
    source = _raw_source(address, port, family)
    return source if source is not None and is_for_others(source) else None


def _raw_source(address: str, port: int, family: int) -> str | None:
    """Return the address this host would send from; None without a route.

    Connecting a UDP socket sends no packet: the kernel only chooses the way.
    """
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((address, port or 9))
            return str(sock.getsockname()[0])
    except OSError:
        return None


def is_for_others(address: str) -> bool:
    """Return whether an address of this host may be reached from another one."""
    found = ipaddress.ip_address(address)
    return not (found.is_loopback or found.is_link_local or found.is_unspecified)


def looked_up(toward: Sequence[tuple[str, int]], family: int) -> list[tuple[str, int]]:
    """Return the addresses of ``toward``, in order; names that are not found in time are left out.

    ``family`` AF_UNSPEC takes those of either one.
    """
    found: dict[int, list[tuple[str, int]]] = {}

    def look_up() -> None:
        for index, (host, port) in enumerate(toward):
            try:
                answers = socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM)
            except (OSError, UnicodeError):
                continue
            found[index] = [(str(answer[4][0]), port) for answer in answers]

    # A resolver that hangs cannot be told to stop; its thread is left behind.
    thread = threading.Thread(target=look_up, name="lookup", daemon=True)
    thread.start()
    thread.join(_LOOKUP_TIMEOUT_S)
    return [answer for index in sorted(found.copy()) for answer in found[index]]

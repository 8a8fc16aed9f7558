"""Which hosts and addresses may be fetched from. Pure: resolves nothing and connects to nothing.

Without a list of hosts only addresses that anybody on the internet can reach are good. With one, its
hosts may be private, but never where clouds keep credentials. IPv4 addresses inside of IPv6 ones are
judged as what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

import idna

Ip = IPv4Address | IPv6Address

# Link-local addresses, and the others at which a cloud tells its machines their credentials.
_NEVER_4 = tuple(
    map(
        IPv4Network,
        (
            *("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"),
            *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),
        ),
    )
)
_NEVER_6 = tuple(
    map(
        IPv6Network,
        ("::/128", "fe80::/10", "fec0::/10", "ff00::/8", "fd00:ec2::254/128", "fd20:ce::254/128"),
    )
)
_GLOBAL_6 = IPv6Network("2000::/3")
# Inside of it: IETF protocols (Teredo among them), 6to4, documentation.
_SPECIAL_6 = tuple(
    map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16"))
)
_RELAY_6TO4 = IPv4Network("192.88.99.0/24")
_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")
_COMPATIBLE = IPv6Network("::/96")
_LOW_32 = 0xFFFF_FFFF

_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")


def host_of(text: str) -> str | None:
    """Return a host's one spelling, without brackets: lower case, ASCII, no final dot; None if it is none.

    Addresses are taken in their usual spelling only: ``0x7f.1`` is no name, and no address either.
    """
    if text.startswith("[") or ":" in text:
        return _ipv6(text)
    if not text.isascii():
        try:
            text = idna.encode(text, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            return None
    name = text.lower().removesuffix(".")
    if _NUMBER.fullmatch(name.rsplit(".", 1)[-1]):
        try:
            return str(IPv4Address(name))
        except ValueError:
            return None
    return name if _NAME.fullmatch(name) else None


def is_listed(host: str, port: int, allowed: Sequence[str]) -> bool:
    """Whether a list of ``host`` and ``host:port`` names this one."""
    return any(
        host == listed and port_of in (None, port) for listed, port_of in map(_entry, allowed)
    )


def may_connect(address: str, *, listed: bool) -> bool:
    """Whether an address that a host resolved to may be connected to; ``listed``: the host is named."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address) and ip.scope_id is not None:
        return False
    if any(_is_never(one) for one in _forms(ip)):
        return False
    return listed or _is_public(ip)


def _entry(text: str) -> tuple[str | None, int | None]:
    name, port = text.strip(), None
    found = re.fullmatch(r"(\[.*\]|[^:]*):([0-9]{1,5})", name)
    if found:
        name, port = found[1], int(found[2])
    return host_of(name), port


def _ipv6(text: str) -> str | None:
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    try:
        ip = IPv6Address(text)
    except ValueError:
        return None
    return None if ip.scope_id is not None else str(ip)


def _forms(ip: Ip) -> Iterator[Ip]:
    """Yield an address and every IPv4 address that packets to it may reach."""
    yield ip
    if isinstance(ip, IPv6Address):
        yield from _embedded(ip)


def _embedded(ip: IPv6Address) -> Iterator[IPv4Address]:
    if ip.ipv4_mapped is not None:
        yield ip.ipv4_mapped
    if ip.sixtofour is not None:
        yield ip.sixtofour
    if ip.teredo is not None:
        yield from ip.teredo
    if ip in _NAT64 or ip in _NAT64_LOCAL or (ip in _COMPATIBLE and int(ip) > 1):
        yield IPv4Address(int(ip) & _LOW_32)


def _is_never(ip: Ip) -> bool:
    if isinstance(ip, IPv4Address):
        return any(ip in network for network in _NEVER_4)
    return any(ip in network for network in _NEVER_6)


def _is_public(ip: Ip) -> bool:
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped is not None:
            return _is_public(ip.ipv4_mapped)
        if ip in _NAT64:  # what a network without IPv4 makes of public IPv4 hosts
            return _is_public(IPv4Address(int(ip) & _LOW_32))
        return ip in _GLOBAL_6 and ip.is_global and not any(ip in net for net in _SPECIAL_6)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and ip not in _RELAY_6TO4

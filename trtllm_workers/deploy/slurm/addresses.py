"""The address by which other nodes reach this one, found on the node itself and handed on in a file.

A step's output carries warnings of srun and of login scripts, so an address never travels there. On
the node: ``python -m trtllm_workers.deploy.slurm.addresses FILE``; where the answer is wanted:
``read_answer(FILE)``.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from trtllm_workers.config.env import environment
from trtllm_workers.config.interfaces import addresses_of_interfaces
from trtllm_workers.errors import ConfigError, LaunchError, StartError
from trtllm_workers.planes.advertise import advertised_host, is_for_others, looked_up

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
HEAD_NODE_IP: Final = "HEAD_NODE_IP"
_EVERY_ADDRESS: Final = ("0.0.0.0", "::")  # IPv4 first, as SLURM does


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAddress:
    """A node's answer. ``address`` is empty when it found none, and ``trouble`` says why.

    ``candidates`` are the other addresses it might have been, for messages.
    """

    host: str
    address: str = ""
    because: str = ""
    candidates: tuple[str, ...] = ()
    trouble: str = ""


def usable(text: str) -> IpAddress:
    """Return the address that ``text`` is, if other nodes can connect to it.

    Raises ConfigError for everything else: loopback, link-local, several addresses in a line, and the
    error message that a command printed where an address was expected.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        raise ConfigError(f"{shown!r} is no IP address") from None
    if not is_for_others(text) or address.is_multicast:
        raise ConfigError(f"{text} is no address that other nodes can connect to")
    return address


def candidates() -> tuple[str, ...]:
    """Return this host's addresses that others may reach; those of containers' networks last."""
    found = sorted(addresses_of_interfaces(), key=lambda one: one.is_of_containers)
    return tuple(dict.fromkeys(one.address for one in found if is_for_others(one.address)))


def choose(given: str | None = None, node_addr: str | None = None) -> NodeAddress:
    """Return the address of this host by which the others reach it.

    * ``given`` wins: an address, the name of an interface of this host, or a host name, which is
      looked up. HEAD_NODE_IP and --advertise-host end up here.
    * Then what ``node_addr``, the node's NodeAddr in SLURM, stands for, if this host has it: SLURM's
      own daemons talk over it.
    * Then the default route's address, or the first of the interfaces.

    Raises ConfigError when ``given`` is of no use, StartError when there is no address at all.
    """
    own = candidates()
    host = socket.gethostname()

    def answer(address: str, because: str) -> NodeAddress:
        others = tuple(one for one in own if one != address)
        return NodeAddress(host=host, address=address, because=because, candidates=others)

    if given:
        return answer(_given(given), f"{given} was given")
    for address in _addresses_of(node_addr) if node_addr else ():
        if address in own:
            return answer(address, f"SLURM knows this node as {node_addr}")
    for every in _EVERY_ADDRESS:
        address = advertised_host(every, None)
        if is_for_others(address):
            return answer(address, "it is the first that others may reach")
    raise StartError(
        f"{host} has no address that other nodes can connect to, only loopback and link-local ones; "
        f"set {HEAD_NODE_IP}, or --advertise-host"
    )


def write_answer(path: Path, given: str | None = None, node_addr: str | None = None) -> None:
    """Choose this host's address and write it, or what keeps it from having one, as JSON.

    The file appears whole or not at all, so another node may wait for it on a shared file system.
    """
    try:
        found = choose(given, node_addr)
    except LaunchError as wrong:
        found = NodeAddress(host=socket.gethostname(), candidates=candidates(), trouble=str(wrong))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(found) + b"\n")
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def read_answer(path: Path) -> NodeAddress:
    """Return what a node wrote, its address checked; FileNotFoundError until it has written.

    Raises StartError for a node without an address, and for a file that no node of ours wrote.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=NodeAddress)
        if not found.trouble:
            usable(found.address)
    except (msgspec.DecodeError, ConfigError) as wrong:
        raise StartError(f"{path}: this should be the address of a node: {wrong}") from None
    if found.trouble:
        raise StartError(f"node {found.host}: {found.trouble}")
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Write this node's answer; see --help."""
    parser = argparse.ArgumentParser(prog="python -m trtllm_workers.deploy.slurm.addresses")
    parser.add_argument("file", type=Path, help="where to write the answer")
    parser.add_argument("--advertise-host", default="", help=f"default: {HEAD_NODE_IP}")
    parser.add_argument("--node-addr", default="", help="default: SLURMD_NODENAME")
    chosen = parser.parse_args(args)
    environ = environment()
    write_answer(
        chosen.file,
        chosen.advertise_host or environ.get(HEAD_NODE_IP, "").strip() or None,
        chosen.node_addr or environ.get("SLURMD_NODENAME") or None,
    )


def _given(given: str) -> str:
    """Return the address that a given address, interface or host name stands for."""
    text = advertised_host(_EVERY_ADDRESS[0], given) if _is_address(given) else _resolved(given)
    return str(usable(text))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _resolved(name: str) -> str:
    # Refuses what is no name, and turns an interface into its address: of either family, which
    # listening on one address leaves open.
    text = advertised_host("127.0.0.1", name)
    if _is_address(text):
        return text
    for address in _addresses_of(text):
        if is_for_others(address):
            return address
    raise ConfigError(
        f"--advertise-host: {name} leads to no address that other nodes can connect to; give an IP address",
        param="advertise_host",
    )


def _addresses_of(name: str) -> list[str]:
    """Return the addresses of a host name, or of an address; IPv4 first."""
    found = [address for address, _ in looked_up([(name, 0)], socket.AF_UNSPEC)]
    return sorted(dict.fromkeys(found), key=lambda one: ":" in one)


if __name__ == "__main__":
    main()

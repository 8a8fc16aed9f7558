"""The HTTP listening socket, and who holds a port that is taken. Linux's /proc, read only."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from trtllm_workers.errors import ConfigError, StartError

_LISTENING = "0A"
_BACKLOG = 4096


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any free one.

    Raises StartError when the port is taken, naming the process where that can be seen, and
    ConfigError when the host is not ours.
    """
    if not 0 <= port <= 65535:  # the system would take it modulo 65536
        raise ConfigError(f"--http-port {port}: ports go from 0 to 65535", param="http_port")
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"--http-host {host} --http-port {port}: {error}", param="http_host"
        ) from error
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Listening here, not later in the server: only now is the port ours.
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _cannot_listen(host, port, error) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _cannot_listen(host: str, port: int, error: OSError) -> StartError | ConfigError:
    if error.errno == errno.EADDRINUSE:
        owner = port_owner(port)
        return StartError(
            f"port {port} is in use{f' by {owner}' if owner else ''}; "
            "choose another with --http-port (0 takes any free one)",
            param="http_port",
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            f"port {port} may only be used by root; choose one above 1023 with --http-port",
            param="http_port",
        )
    return ConfigError(
        f"cannot listen on {host}:{port}: {error.strerror}; choose another --http-host",
        param="http_host",
    )


def port_owner(port: int, proc: Path = Path("/proc")) -> str:
    """Return ``pid N (name)`` of a process that listens on a TCP port; empty when not to be seen."""
    inodes = _listening_inodes(port, proc)
    if not inodes:
        return ""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for folder in proc.glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in wanted for link in (folder / "fd").iterdir()):
                name = (folder / "comm").read_text().strip()
                return f"pid {folder.name} ({name})"
        except OSError:
            continue  # another user's process, or one that just ended
    return ""


def _listening_inodes(port: int, proc: Path) -> set[str]:
    inodes: set[str] = set()
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            local, state, inode = fields[1], fields[3], fields[9]
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                inodes.add(inode)
    return inodes

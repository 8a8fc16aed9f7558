"""Is this port free, and if not, who holds it? Binds for a moment; serves nothing."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence

from trtllm_workers.deploy import proc
from trtllm_workers.deploy.run import Run, RunRecord
from trtllm_workers.errors import ConfigError

_LISTEN = "0A"
_EVERY_HOST = ("0.0.0.0", "::")


def require_free_port(host: str, port: int, runs: Sequence[Run] = ()) -> None:
    """Raise ConfigError naming who holds the port, or what else keeps it from being listened on.

    ``runs`` are the known ones: a run that is still starting has claimed its port but does not
    listen yet, and one of ours is named by its id. Of port 0 only the host is checked.
    """
    for run in runs:
        if port and run.alive and run.record is not None and _claims(run.record, host, port):
            raise ConfigError(_held_by_run(host, port, run), param="http_port")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as wrong:
        raise ConfigError(
            f"unknown host '{host}': {wrong.strerror}; "
            "write an address of this machine, e.g. 127.0.0.1",
            param="http_host",
        ) from wrong
    for family, kind, protocol, _, address in places:
        with socket.socket(family, kind, protocol) as probe:
            # Left-overs of closed connections do not count, as they will not for the ingress.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as wrong:
                raise _explained(wrong, host, port, runs) from wrong


def port_holder(port: int) -> int | None:
    """Return the pid of a process that listens on ``port``, or None where that cannot be seen."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return None
    for process in proc.everyone():
        folder = proc.PROC / str(process.pid) / "fd"
        try:
            handles = os.listdir(folder)
        except OSError:
            continue
        for handle in handles:
            try:
                if os.readlink(folder / handle) in sockets:
                    return process.pid
            except OSError:
                continue
    return None


def _claims(record: RunRecord, host: str, port: int) -> bool:
    same_host = record.http_host == host or not {record.http_host, host}.isdisjoint(_EVERY_HOST)
    return record.http_port == port and same_host


def _explained(wrong: OSError, host: str, port: int, runs: Sequence[Run]) -> ConfigError:
    if wrong.errno == errno.EADDRINUSE:
        holder = port_holder(port)
        for run in runs:
            if holder is not None and holder in run.members:
                return ConfigError(_held_by_run(host, port, run), param="http_port")
        who = "another process" if holder is None else f"process {holder} ({proc.command(holder)})"
        text = f"port {port} on {host} is in use by {who}; stop it, or choose another --http-port"
        return ConfigError(text, param="http_port")
    if wrong.errno == errno.EACCES:
        return ConfigError(
            f"port {port} needs root; choose one above 1023 with --http-port", param="http_port"
        )
    if wrong.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"'{host}' is no address of this machine; "
            "use 127.0.0.1 (this machine only) or 0.0.0.0 (everyone) for --http-host",
            param="http_host",
        )
    return ConfigError(
        f"cannot listen on port {port} of {host}: {wrong.strerror}", param="http_port"
    )


def _held_by_run(host: str, port: int, run: Run) -> str:
    return (
        f"port {port} on {host} is in use by run {run.run_id}; "
        f"stop it with: trtllm-launch stop {run.run_id}, or choose another --http-port"
    )


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for table in ("net/tcp", "net/tcp6"):
        try:
            rows = (proc.PROC / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found

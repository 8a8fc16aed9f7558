"""The etcd of one job: its program, its ports, its login, its life beside the process that owns it.

A single member, whose data ends with the job. It asks for a user and a password that every process of the
cluster can work out from the cluster secret; so whoever reaches the port can read and write nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_STREAM, socket
from typing import Any

from trtllm_workers.config.outside import EtcdUrl
from trtllm_workers.deploy.nats import end_server, end_with_parent
from trtllm_workers.errors import ConfigError, StartError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.observe.status import StatusFile

log = get_logger(__name__)

PROGRAM = "etcd"
USER = "root"
_START_TIMEOUT_S = 30.0
_ATTEMPTS = 5
_LOOK_S = 0.05
_DATA = "data"


def etcd_password(secret: bytes) -> str:
    """Return the password of a job's own etcd, made from the cluster secret, which it cannot tell."""
    return hmac.new(secret, b"discovery on etcd", "sha256").hexdigest()


def etcd_folder(run_id: str) -> Path:
    """Return where a job's own etcd keeps its data: on its node, for a shared file system syncs slowly."""
    return Path(tempfile.gettempdir()) / f"trtllm-launch-etcd-{run_id}"


def etcd_program() -> str:
    """Return the path of etcd; "" when there is none."""
    return shutil.which(PROGRAM) or ""


async def run_etcd(folder: Path, host: str, password: str, status: StatusFile) -> None:
    """Run a member until SIGTERM or SIGINT; its URL is told in ``status`` once it asks for the password.

    Raises ConfigError when there is no program, StartError when it does not start or ends by itself.
    """
    program = etcd_program()
    if not program:
        raise ConfigError(
            f"there is no etcd on {os.uname().nodename}; install it (Debian: apt-get install etcd-server), "
            "or let workers register in the run's folder: --services folder",
            param="services",
        )
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stopped = asyncio.ensure_future(stop.wait())
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            client, peer = _free_ports(host)
            server = await _start(program, folder, host, client, peer)
            ended = asyncio.ensure_future(server.wait())
            try:
                if await _serves(EtcdUrl(((host, client),), False), password, ended, stopped):
                    url = str(EtcdUrl(((host, client),), False))
                    status.report("listening", detail=url)
                    log.info("etcd started", url=url, program=program)
                    await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
                    if not stopped.done():
                        raise StartError(f"etcd ended by itself with exit code {ended.result()}")
                if stopped.done():
                    status.report("draining")
                    return
            finally:
                await end_server(server, ended)
            # Somebody else took a port in between: etcd cannot be told to take any free one.
            shutil.rmtree(folder / _DATA, ignore_errors=True)
            log.warning("etcd did not start; trying other ports", attempt=attempt)
        raise StartError(
            f"etcd did not start in {_ATTEMPTS} attempts; its log is {folder / 'log'}:\n{_tail(folder)}"
        )
    finally:
        stopped.cancel()
        shutil.rmtree(folder, ignore_errors=True)


async def _start(
    program: str, folder: Path, host: str, client: int, peer: int
) -> asyncio.subprocess.Process:
    await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
    place = f"[{host}]" if ":" in host else host
    at, beside = f"http://{place}:{client}", f"http://127.0.0.1:{peer}"
    arguments = {
        "name": "job",
        "data-dir": str(folder / _DATA),
        "listen-client-urls": at,
        "advertise-client-urls": at,
        "listen-peer-urls": beside,
        "initial-advertise-peer-urls": beside,
        "initial-cluster": f"job={beside}",
        # Its data ends with the job, on whatever file system that lies: no fsync is worth waiting for.
        "auto-compaction-retention": "1",
    }
    with (folder / "log").open("ab") as output:
        return await asyncio.create_subprocess_exec(
            program,
            *(f"--{name}={value}" for name, value in arguments.items()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=end_with_parent,
        )


async def _serves(
    url: EtcdUrl,
    password: str,
    ended: asyncio.Future[int],
    stopped: asyncio.Future[Any],
) -> bool:
    """Return whether it answers and asks for the password now; False when it has ended before."""
    from trtllm_workers.planes.etcd_setup import require_password

    ends_s = asyncio.get_running_loop().time() + _START_TIMEOUT_S
    while not (ended.done() or stopped.done()):
        if await require_password(url, USER, password):
            return True
        if asyncio.get_running_loop().time() > ends_s:
            raise StartError(f"etcd does not answer at {url} after {_START_TIMEOUT_S:g} s")
        await asyncio.sleep(_LOOK_S)
    return False


def _free_ports(host: str) -> tuple[int, int]:
    with ExitStack() as stack:
        found = []
        for one in (host, "127.0.0.1"):
            probe = stack.enter_context(socket(AF_INET6 if ":" in one else AF_INET, SOCK_STREAM))
            try:
                probe.bind((one, 0))
            except OSError as wrong:
                raise ConfigError(
                    f"etcd cannot listen on {one}: {wrong.strerror}; it is no address of this host",
                    param="services",
                ) from wrong
            found.append(int(probe.getsockname()[1]))
    return found[0], found[1]


def _tail(folder: Path) -> str:
    with suppress(OSError):
        return "\n".join((folder / "log").read_text(errors="replace").splitlines()[-5:])
    return ""

"""The NATS server of one run: its program, its config file, its life beside the process that owns it.

Listens on loopback alone unless the run has several hosts, on a free port, and asks for a token that every
process of the cluster can work out from the cluster secret, so nothing secret stands on a command line.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any

from trtllm_workers.errors import ConfigError, StartError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.observe.status import StatusFile

log = get_logger(__name__)

_PROGRAM = "nats-server"
LOOPBACK = "127.0.0.1"
_START_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 5.0
_LOOK_S = 0.02
_PR_SET_PDEATHSIG = 1
_ALL_IS_WELL = b"[INF]"


def nats_program() -> str:
    """Return the path of nats-server, the one of this environment first; "" when there is none."""
    beside = Path(sysconfig.get_path("scripts")) / _PROGRAM
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(_PROGRAM) or ""


async def run_nats(folder: Path, token: str, status: StatusFile, host: str = LOOPBACK) -> None:
    """Run a server until SIGTERM or SIGINT. Its files go into ``folder``, which must not be shared.

    Raises ConfigError when there is no program, StartError when it does not start or ends by itself.
    """
    program = nats_program()
    if not program:
        raise ConfigError(
            "there is no nats-server for the prefill queue; run: pip install 'trtllm-launch[nats]', or "
            "name a server with --nats-server",
            param="prefill_dispatch",
        )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    config = _write_config(folder, token, host)
    server = await asyncio.create_subprocess_exec(
        program,
        *("-c", str(config)),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=end_with_parent,
    )
    speaking = asyncio.create_task(_pass_on(server))
    ended = asyncio.ensure_future(server.wait())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        url = await _url(folder, host, ended, stopped)
        if url:
            status.report("listening", detail=url)
            log.info("NATS server started", url=url, program=program)
            await asyncio.wait({ended, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            raise StartError(f"nats-server ended by itself with exit code {ended.result()}")
        status.report("draining")
    finally:
        stopped.cancel()
        await end_server(server, ended)
        await speaking


def _write_config(folder: Path, token: str, host: str) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in folder.glob("*.ports"):
        old.unlink()
    path = folder / "nats.conf"
    text = "\n".join(
        [
            f"host: {json.dumps(host)}",
            "port: -1",
            f"authorization: {{ token: {json.dumps(token)} }}",
            f"jetstream: {{ store_dir: {json.dumps(str(folder))} }}",
            f"ports_file_dir: {json.dumps(str(folder))}",
            "",
        ]
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    return path


async def _url(
    folder: Path, host: str, ended: asyncio.Future[int], stopped: asyncio.Task[Any]
) -> str:
    """Wait until the server has told its port and answers there; "" when told to stop before."""
    deadline = asyncio.get_running_loop().time() + _START_TIMEOUT_S
    while not stopped.done():
        if ended.done():
            raise StartError(f"nats-server did not start: exit code {ended.result()}, see above")
        with suppress(OSError):
            if url := _told(folder):
                _, writer = await asyncio.open_connection(host, int(url.rpartition(":")[2]))
                writer.close()
                return url
        if asyncio.get_running_loop().time() >= deadline:
            raise StartError(f"nats-server does not answer after {_START_TIMEOUT_S:g} s")
        await asyncio.sleep(_LOOK_S)
    return ""


def _told(folder: Path) -> str:
    """Return the URL that the server wrote; "" when it has not, or not wholly."""
    for path in folder.glob("*.ports"):
        with suppress(OSError, ValueError, KeyError, IndexError):
            return str(json.loads(path.read_text())["nats"][0])
    return ""


async def _pass_on(server: asyncio.subprocess.Process) -> None:
    """Show what the server says, without what it tells when all is well."""
    assert server.stderr is not None
    async for line in server.stderr:
        if _ALL_IS_WELL not in line:
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()


async def end_server(server: asyncio.subprocess.Process, ended: asyncio.Future[int]) -> None:
    """Ask a server to end, wait, and end it."""
    if not ended.done():
        with suppress(ProcessLookupError):
            server.terminate()
        await asyncio.wait({ended}, timeout=_END_TIMEOUT_S)
    if not ended.done():
        with suppress(ProcessLookupError):
            server.kill()
        await asyncio.wait({ended})


def end_with_parent() -> None:
    """Let the kernel end the server when the process that owns it dies; runs in the child."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

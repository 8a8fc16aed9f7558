"""An ingress process: listen, follow the workers, serve, drain, end. Knows no engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import time
from collections.abc import Callable, Iterator

import structlog
import uvicorn

from trtllm_workers.errors import LaunchError
from trtllm_workers.ingress.app import IngressApp
from trtllm_workers.ingress.http import http_protocol
from trtllm_workers.ingress.parts import Ingress
from trtllm_workers.ingress.ports import listen
from trtllm_workers.ingress.settings import IngressSettings
from trtllm_workers.observe.status import StatusFile
from trtllm_workers.planes.base import Discovery
from trtllm_workers.planes.discovery import open_discovery
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.messages import StopAsk
from trtllm_workers.types import NO_ENGINE, Role, WorkerRecord

__all__ = ["IngressSettings", "serve_ingress"]

log = structlog.get_logger(__name__)

# How long error events of aborted streams get to leave after the drain's own deadline.
_LAST_WORDS_S = 2.0


async def serve_ingress(settings: IngressSettings) -> None:
    """Run one ingress until SIGTERM or SIGINT, then drain and return; a second signal cuts short.

    Raises StartError or ConfigError for a port that cannot be had.
    """
    status = StatusFile(settings.status_file)
    status.report("starting")
    with contextlib.closing(listen(settings.http_host, settings.http_port)) as sock:
        ingress = Ingress(settings)
        incarnation = new_incarnation()
        mesh = TcpMesh(
            # Any number of ingresses may stand before one deployment; each is a peer of its own.
            peer_id=f"{settings.process_name}-{incarnation[-8:]}",
            incarnation=incarnation,
            secret=settings.secret,
            on_message=ingress.on_message,
            on_lost=ingress.on_lost,
            host=settings.plane_host,
            port=settings.plane_port,
            advertise_host=settings.plane_advertise_host,
            tls=settings.plane_tls,
        )
        discovery = open_discovery(settings.discovery, settings.namespace, settings.etcd)
        try:
            await mesh.start()
            async with ingress.running(mesh, discovery) as app:
                joining = asyncio.create_task(_register(mesh, discovery, settings), name="register")
                try:
                    await _serve_http(ingress, app, sock, settings, status)
                finally:
                    joining.cancel()
                    await asyncio.gather(joining, return_exceptions=True)
        finally:
            await mesh.close()
            await discovery.close()


async def _register(mesh: TcpMesh, discovery: Discovery, settings: IngressSettings) -> None:
    """Let the deployment be found as a whole. Serving does not depend on it, so failing is no error."""
    address = mesh.address
    record = WorkerRecord(
        worker_id=address.peer_id,
        model="",
        role=Role.INGRESS,
        address=address,
        engine=NO_ENGINE,
        started_at_s=time.time(),
    )
    try:
        await discovery.register(record)
    except LaunchError as error:
        log.warning(
            "this ingress is not registered; 'stop --all-hosts' will not find it", why=str(error)
        )


async def _serve_http(
    ingress: Ingress,
    app: IngressApp,
    sock: socket.socket,
    settings: IngressSettings,
    status: StatusFile,
) -> None:
    host, port = sock.getsockname()[:2]

    def listening() -> None:
        # What is there now stays: leave it out of every later collection, which would stop all
        # streams for as long as it takes to look at it.
        gc.collect()
        gc.freeze()
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("listening", url=url)
        settings.on_listening(host, port)
        status.report("listening", detail=url)

    server = HttpServer(app, settings, listening)
    serving = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    signals: asyncio.Queue[str] = asyncio.Queue()
    drain_timeout_s = [settings.drain_timeout_s]

    def told(message: StopAsk) -> None:
        if settings.tells_launcher_to_stop is None or not settings.tells_launcher_to_stop():
            drain_timeout_s[0] = message.drain_timeout_s
            signals.put_nowait(message.reason)

    ingress.on_stop_ask = told
    with _signals(signals):
        stopped = asyncio.create_task(signals.get(), name="signals")
        try:
            await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                return serving.result()
            status.report("draining")
            await _drain(ingress, stopped.result(), signals, drain_timeout_s[0])
            server.should_exit = True
            await serving
        finally:
            stopped.cancel()
            if not serving.done():
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)


async def _drain(
    ingress: Ingress, name: str, signals: asyncio.Queue[str], timeout_s: float
) -> None:
    """Finish running streams within the deadline, then abort; a second signal aborts at once."""
    dispatcher = ingress.dispatcher
    assert dispatcher is not None, "a serving ingress has a dispatcher"
    log.info("draining", signal=name, requests=dispatcher.num_answers, timeout_s=timeout_s)
    draining = asyncio.create_task(ingress.drain(f"{name} was received", timeout_s))
    again = asyncio.create_task(signals.get())
    try:
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        if draining.done() and draining.result():
            return
        log.warning("requests are aborted", requests=dispatcher.num_answers)
        dispatcher.abort_all("the ingress is stopping")
        await ingress.drain(f"{name} was received", _LAST_WORDS_S)
    finally:
        for task in (draining, again):
            task.cancel()
        await asyncio.gather(draining, again, return_exceptions=True)


@contextlib.contextmanager
def _signals(received: asyncio.Queue[str]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, received.put_nowait, number.name)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


class HttpServer(uvicorn.Server):
    """uvicorn, without its own signals; says when it accepts connections."""

    def __init__(
        self, app: IngressApp, settings: IngressSettings, on_listening: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=http_protocol(settings.max_connections),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",  # that it starts and stops is told in our own words
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=int(settings.keep_alive_timeout_s),
                timeout_graceful_shutdown=max(1, int(_LAST_WORDS_S)),
                backlog=4096,
            )
        )
        self._on_listening = on_listening

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs the process."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        self._on_listening()

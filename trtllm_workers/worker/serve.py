"""A worker's life: load the engine, listen, register, serve, drain, end. Knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.config.outside import EtcdLogin, TlsFiles
from trtllm_workers.engines.base import Engine, EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.errors import EngineDead, LaunchError
from trtllm_workers.observe.status import StatusFile
from trtllm_workers.planes.base import Discovery, Lease
from trtllm_workers.planes.discovery import open_discovery
from trtllm_workers.planes.mesh import TcpMesh, new_incarnation
from trtllm_workers.planes.queue import WorkQueue
from trtllm_workers.transfer.base import KvTransport
from trtllm_workers.transfer.prefault import prefault
from trtllm_workers.types import EngineInfo, Role, WorkerRecord, WorkerState
from trtllm_workers.worker.canary import Canary
from trtllm_workers.worker.kv_feeds import why_no_events
from trtllm_workers.worker.ledger import Ledger
from trtllm_workers.worker.media_parts import (
    check_role,
    join_media,
    open_media_transports,
    told_info,
)
from trtllm_workers.worker.pairing import open_kv_transports, owned_by, pair_statuses, start_pairs
from trtllm_workers.worker.prefill_desk import HandoffLimits
from trtllm_workers.worker.queue_end import PrefillQueue, join_queue, open_prefill_queue
from trtllm_workers.worker.service import WorkerService
from trtllm_workers.worker.stopping import Stopping
from trtllm_workers.worker.watchdog import Watchdog

log = structlog.get_logger(__name__)
T = TypeVar("T")

STATS_INTERVAL_S = 1.0
LEDGER_TIMEOUT_S = 5.0
READY_FOR_IMAGES_BYTES = 256 << 20
# How long the last chunks of aborted streams get to leave the engine and the socket.
FLUSH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Everything ``serve_worker`` needs.

    * ``discovery``: a discovery URL, with ``namespace`` the deployment under it and ``etcd`` the login
      where it is etcd; ``secret``: the cluster secret. ``plane_tls``: encrypt the request plane.
    * ``host``, ``port``: where ingresses reach the request plane (0: a free port);
      ``advertise_host`` is the name they use for it (default: the same).
    * ``drain_timeout_s``: on SIGTERM running streams get this long, then they are aborted.
    * ``kv_transport``: how roles prefill and decode move KV: ucx, nixl, tcp, or auto (the first that
      starts). ``max_local_prefill_length``: a decode worker computes prompts itself whose uncached
      part has at most so many tokens. ``canary_interval_s``: how often it probes each prefill worker;
      0: only when it connects.
    * ``prefill_timeout_s``: how long a decode worker waits for a prefill worker's offer.
      ``handoff_min_timeout_s`` and ``handoff_max_timeout_s`` bound the deadline of a transfer.
    * ``stall_timeout_s``: an engine that makes no token and no step for so long is taken for dead; 0: never.
    * ``prefill_queue``: roles prefill and decode hand prompts over through it; None: directly.
    * ``tells_launcher_to_stop``: see ``stopping.py``.
    * ``media``: what this worker may load for images. ``encodes``: it makes embeddings of them itself, and
      loads the model's vision tower for that; else encode workers do. Without ``takes_images`` it is a
      worker for text alone, whatever its model can.
    * ``on_loaded``: called once when engine and transports are there, before others learn of this worker.
    * ``extra``: engine options that are not TensorRT-LLM keys, see ``EngineOptions``.
    """

    worker_id: str
    model_path: Path
    served_model_name: str
    engine: str
    engine_config: EngineConfig
    discovery: str
    secret: bytes
    role: Role = Role.AGGREGATED
    host: str = "127.0.0.1"
    port: int = 0
    advertise_host: str | None = None
    status_file: Path | None = None
    drain_timeout_s: float = 30.0
    kv_transport: str = "ucx"
    max_local_prefill_length: int = 0
    canary_interval_s: float = 60.0
    prefill_timeout_s: float = 60.0
    handoff_min_timeout_s: float = 5.0
    handoff_max_timeout_s: float = 120.0
    stall_timeout_s: float = 120.0
    prefill_queue: PrefillQueue | None = None
    tells_launcher_to_stop: Callable[[], bool] | None = None
    media: MediaSettings = field(default_factory=MediaSettings)
    encodes: bool = True
    takes_images: bool = True
    on_loaded: Callable[[], None] = lambda: None
    namespace: str = "default"
    etcd: EtcdLogin = field(default_factory=EtcdLogin)
    plane_tls: TlsFiles = field(default_factory=TlsFiles)
    extra: Mapping[str, str] = field(default_factory=dict)


async def serve_worker(settings: WorkerSettings) -> None:
    """Run one worker until SIGTERM or SIGINT, then drain and return.

    Raises ConfigError for what the operator can mend, EngineDead when the engine gave up.
    """
    structlog.contextvars.bind_contextvars(worker_id=settings.worker_id)
    status = StatusFile(settings.status_file)
    status.report("starting")
    stop = _stop_on_signals()
    stopping = Stopping(stop, settings.drain_timeout_s, settings.tells_launcher_to_stop)
    engine = build_engine(
        settings.engine,
        EngineOptions(
            model_path=settings.model_path,
            config=settings.engine_config,
            on_progress=lambda done: status.report("model", done=done),
            extra=settings.extra,
            media=settings.media,
            encodes=settings.role is Role.ENCODE or (settings.encodes and settings.takes_images),
            generates=settings.role is not Role.ENCODE,
        ),
    )
    limits = HandoffLimits(
        min_timeout_s=settings.handoff_min_timeout_s,
        max_timeout_s=settings.handoff_max_timeout_s,
        prefill_timeout_s=settings.prefill_timeout_s,
    )
    service = WorkerService(
        settings.worker_id, settings.role, engine, limits=limits, on_stop_ask=stopping.ask
    )
    mesh = TcpMesh(
        peer_id=settings.worker_id,
        incarnation=new_incarnation(),
        secret=settings.secret,
        on_message=service.on_message,
        on_lost=service.on_lost,
        host=settings.host,
        port=settings.port,
        advertise_host=settings.advertise_host,
        tls=settings.plane_tls,
    )
    discovery: Discovery | None = None
    transports: tuple[KvTransport, ...] = ()
    media_transports: tuple[KvTransport, ...] = ()
    queue: WorkQueue | None = None
    try:
        if settings.prefill_queue is not None:
            opening = open_prefill_queue(
                settings.prefill_queue,
                settings.role,
                worker_id=settings.worker_id,
                prefill_timeout_s=settings.prefill_timeout_s,
            )
            queue = await _unless_stopped(opening, stop)
            if queue is None:
                return
        status.report("model", done=0.0)
        began_s = time.monotonic()
        info = await _unless_stopped(engine.start(), stop)
        if info is None:
            return
        check_role(settings.role, engine, info, settings.served_model_name)
        info = told_info(engine, info)
        if not settings.takes_images:
            info = msgspec.structs.replace(info, vision=None)
        if engine.kv_pool is not None:
            await asyncio.to_thread(prefault, engine.kv_pool)
        if engine.media_store is not None and info.vision is not None:
            # Not all of it: what more images need gets its pages when it is used first.
            await asyncio.to_thread(prefault, engine.media_store.pool, READY_FOR_IMAGES_BYTES)
        log.info("engine started", seconds=round(time.monotonic() - began_s, 2), **_summary(info))
        generates = settings.role is not Role.ENCODE
        no_kv_events: str | None = "role encode computes no prompt"
        if generates:
            no_kv_events = await _unless_stopped(why_no_events(engine, info), stop)
        if no_kv_events is None:
            return
        if no_kv_events and info.kv_events and generates:
            log.warning("a router cannot rely on this worker's KV events", reason=no_kv_events)
        status.report("registering")
        transports = await open_kv_transports(
            settings.kv_transport,
            settings.role,
            engine,
            info,
            worker_id=settings.worker_id,
            host=settings.advertise_host or settings.host,
        )
        if transports:
            names = ",".join(transport.name for transport in transports)
            info = msgspec.structs.replace(info, kv_transport=names)
        media_transports = await open_media_transports(
            settings.kv_transport,
            settings.role,
            engine,
            info,
            worker_id=settings.worker_id,
            host=settings.advertise_host or settings.host,
        )
        await mesh.start()
        settings.on_loaded()
        service.attach(
            mesh, info, transports, max_local_prefill_length=settings.max_local_prefill_length
        )
        join_media(
            service,
            settings.worker_id,
            engine,
            info,
            mesh,
            media_transports,
            settings.media,
            limits,
        )
        if queue is not None:
            join_queue(
                service,
                queue,
                settings.role,
                mesh,
                engine,
                info,
                transports,
                prefill_timeout_s=settings.prefill_timeout_s,
            )
        discovery = open_discovery(settings.discovery, settings.namespace, settings.etcd)
        record = WorkerRecord(
            worker_id=settings.worker_id,
            model=settings.served_model_name,
            role=settings.role,
            address=mesh.address,
            engine=info,
            started_at_s=time.time(),
            max_local_prefill_length=settings.max_local_prefill_length,
            queues_prefill=queue is not None and settings.role is Role.DECODE,
            no_kv_events=no_kv_events,
        )
        async with contextlib.AsyncExitStack() as stack:
            lease = await discovery.register(record)
            canary: Canary | None = None
            if settings.role is Role.DECODE:
                canary = await start_pairs(
                    service,
                    engine,
                    info,
                    mesh,
                    discovery,
                    transports,
                    status,
                    stack,
                    worker_id=settings.worker_id,
                    model=settings.served_model_name,
                    canary_interval_s=settings.canary_interval_s,
                )
            else:
                status.report("registered")
            log.info(
                "registered", model=record.model, role=str(record.role), address=str(mesh.address)
            )
            watchdog = Watchdog(
                settings.worker_id,
                engine,
                info,
                lambda: service.progress,
                # An engine without a language model refuses every probe; there is nothing to prove.
                timeout_s=settings.stall_timeout_s if generates else 0.0,
            )
            owned = owned_by(service, canary)
            ledger = Ledger(engine, lambda: owned() | watchdog.request_ids, service.meters)
            died = await _serve_until(stop, engine, service, ledger, watchdog, status)
            watchdog.close()
            status.report("draining")
            if died is not None:
                service.drain(str(died))
                await _until_idle(service, FLUSH_TIMEOUT_S)
                raise died
            await _drain(stopping.drain_timeout_s, service, lease, record)
    finally:
        if discovery is not None:
            await _quietly(discovery.close())
        await _quietly(service.close())
        if queue is not None:
            await _quietly(queue.close())
        for transport in (*transports, *media_transports):
            await _quietly(transport.close())
        await _quietly(engine.close())
        await _quietly(mesh.close())


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def _unless_stopped(work: Awaitable[T], stop: asyncio.Event) -> T | None:
    """Return the result of ``work``, or None (and cancel it) when ``stop`` comes first."""
    task = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        return None
    finally:
        stopped.cancel()


async def _serve_until(
    stop: asyncio.Event,
    engine: Engine,
    service: WorkerService,
    ledger: Ledger,
    watchdog: Watchdog,
    status: StatusFile,
) -> EngineDead | None:
    """Serve; return None when stopped, or the error the engine died of."""
    died = asyncio.ensure_future(engine.died())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        while True:
            done, _ = await asyncio.wait(
                {died, stopped}, timeout=STATS_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
            )
            if died in done:
                return died.result()
            if stopped in done:
                return None
            service.publish_stats()
            if service.pairs is not None:
                status.report_pairs(pair_statuses(service.pairs))
            if (stalled := watchdog.check()) is not None:
                log.error("engine stalled", reason=str(stalled))
                return stalled
            # A wedged engine does not say what it holds either; it must not keep the watchdog waiting.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEDGER_TIMEOUT_S):
                    await ledger.check()
    finally:
        for task in (died, stopped):
            task.cancel()


async def _drain(
    drain_timeout_s: float, service: WorkerService, lease: Lease, record: WorkerRecord
) -> None:
    """Take no new requests, let running ones finish within the deadline, abort the rest."""
    service.drain("it was told to stop")
    with contextlib.suppress(LaunchError):
        await lease.update(msgspec.structs.replace(record, state=WorkerState.DRAINING))
    log.info("draining", streams=service.num_streams, timeout_s=drain_timeout_s)
    if await _until_idle(service, drain_timeout_s):
        return
    log.warning("drain timeout: streams are aborted", streams=service.num_streams)
    service.abort_all()
    await _until_idle(service, FLUSH_TIMEOUT_S)


async def _until_idle(service: WorkerService, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while service.num_streams:
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def _quietly(closing: Awaitable[None]) -> None:
    """Close one part; what goes wrong is logged, so that the other parts are closed too."""
    try:
        await closing
    except Exception:
        log.exception("closing a part of the worker failed")


def _summary(info: EngineInfo) -> dict[str, object]:
    return {
        "engine": info.engine,
        "model_path": info.model_path,
        "device": info.device,
        "dtype": info.dtype,
        "block_size": info.block_size,
        "num_blocks": info.num_blocks,
        "max_seq_len": info.max_seq_len,
        "max_batch_size": info.max_batch_size,
    }

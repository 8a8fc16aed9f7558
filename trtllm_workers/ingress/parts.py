"""The parts of an ingress, wired together over a plane and a discovery. Opens no HTTP port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from trtllm_workers.errors import PeerLost
from trtllm_workers.ingress.app import IngressApp, make_app
from trtllm_workers.ingress.dispatch import Dispatcher
from trtllm_workers.ingress.encoders import Encoders
from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.ingress.handoff_meters import observe_phases, show_handoffs
from trtllm_workers.ingress.meters import Meters
from trtllm_workers.ingress.placing import Placer
from trtllm_workers.ingress.router_meters import show_router
from trtllm_workers.ingress.served import Worker
from trtllm_workers.ingress.settings import IngressSettings
from trtllm_workers.ingress.streams import Streams
from trtllm_workers.observe.metrics import Metrics, record_engine_stats
from trtllm_workers.observe.metrics_table import TABLE
from trtllm_workers.planes.base import Discovery, Peer, RequestPlane
from trtllm_workers.planes.media_messages import Encoded, EncodeFailed
from trtllm_workers.planes.messages import (
    Drain,
    KvEvents,
    Message,
    StopAsk,
    Tokens,
    WorkerStats,
)

_REGISTERED = "trtllm_launch_registered_workers"
_HIT_RATE = "trtllm_launch_router_hit_ratio"
_FRAMES = "trtllm_launch_frames_sent_total"
_ENGINE_METRICS = tuple(spec.name for spec in TABLE if "worker_id" in spec.labels)

# Tokenizers are loaded and large prompts encoded here; more threads than cores gain nothing.
_TEXT_THREADS = 2


class Ingress:
    """Give ``on_message`` and ``on_lost`` to the plane, then use ``running``."""

    def __init__(self, settings: IngressSettings, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self.metrics = metrics or Metrics()
        self.fleet: Fleet | None = None
        self.dispatcher: Dispatcher | None = None
        self._streams: Streams | None = None
        self._encoders = Encoders(self.metrics)
        # Told when somebody closes the deployment: drain for so many seconds, and why.
        self.on_stop_ask: Callable[[StopAsk], None] | None = None

    def on_message(self, peer: Peer, message: Message) -> None:
        """Take one message from a worker, or from whoever closes the deployment."""
        if isinstance(message, Tokens):
            if self._streams is not None:
                self._streams.on_tokens(peer, message)
        elif self.fleet is None:
            return
        elif isinstance(message, StopAsk):
            if self.on_stop_ask is not None:
                peer.send(Drain(message.reason))
                self.on_stop_ask(message)
        elif isinstance(message, KvEvents):
            self.fleet.peer_events(peer, message)
        elif isinstance(message, Drain):
            self.fleet.peer_drains(peer, message.reason)
        elif isinstance(message, Encoded | EncodeFailed):
            self._encoders.on_answer(peer, message)
        elif isinstance(message, WorkerStats):
            worker = self.fleet.peer_stats(peer, message)
            if worker is not None:
                observe_phases(self.metrics, worker.record.model, message.handoffs)

    def on_lost(self, peer: Peer, error: PeerLost) -> None:
        """Take notice that a connection ended."""
        if self.fleet is not None:
            self.fleet.peer_lost(peer, error)

    @asynccontextmanager
    async def running(self, plane: RequestPlane, discovery: Discovery) -> AsyncIterator[IngressApp]:
        """Follow the workers and yield the app; ``plane`` has been started."""
        executor = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="text")
        placer = Placer(self._settings.router.open(), self._settings.strategy)
        streams = self._streams = Streams(plane.address, placer.charge)
        fleet = self.fleet = Fleet(
            plane,
            discovery,
            executor,
            placer,
            on_lost=self._worker_lost,
            model_path=self._settings.model_path,
            connect_timeout_s=self._settings.connect_timeout_s,
        )
        dispatcher = self.dispatcher = Dispatcher(
            fleet, streams, self._encoders, Meters(self.metrics), self._settings
        )
        self.metrics.before_render(self._show_workers)
        try:
            async with fleet.running():
                yield make_app(dispatcher, fleet, self.metrics)
        finally:
            self.fleet = None  # connections that end from now on are our own doing
            # Threads cannot be cancelled; a tokenizer that is loading ends with the process.
            executor.shutdown(wait=False, cancel_futures=True)

    def _worker_lost(self, worker: Worker, error: PeerLost) -> None:
        assert self.dispatcher is not None, "a fleet runs with its dispatcher"
        self._encoders.worker_lost(worker, error)
        self.dispatcher.worker_lost(worker, error)

    def _show_workers(self) -> None:
        """Set what is read from the workers when somebody looks; those that are gone show nothing."""
        if self.fleet is None:
            return
        for name in (_REGISTERED, _HIT_RATE, *_ENGINE_METRICS):
            self.metrics.remove(name)
        for served in self.fleet.models.values():
            for worker in served.workers:
                role, state = str(worker.record.role), worker.state
                self.metrics.gauge(_REGISTERED, model=served.name, role=role, state=state).add()
                if worker.load is not None:
                    record_engine_stats(self.metrics, worker.worker_id, worker.load.stats)
                    frames = self.metrics.counter(_FRAMES, worker_id=worker.worker_id)
                    frames.advance_to(worker.load.num_frames)
                    show_handoffs(self.metrics, worker.load)
        show_router(self.metrics, self.fleet)

    async def drain(self, reason: str, timeout_s: float) -> bool:
        """Take no new requests and wait for the running ones. True when all have ended."""
        assert self.dispatcher is not None, "only a running ingress drains"
        self.dispatcher.closing = reason
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.dispatcher.idle.wait()
        return self.dispatcher.idle.is_set()

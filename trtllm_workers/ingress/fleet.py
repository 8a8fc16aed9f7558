"""Which workers live, for which model, and what is known of each.

Follows discovery, keeps a connection to every worker, tells the router what they say, and loads a model's
tokenizer when its first worker appears. Which worker takes a request is decided in ``placing.py``. Knows no request's text and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import structlog

from trtllm_workers.errors import (
    LaunchError,
    ModelNotFound,
    PeerLost,
    PlaneError,
    Unavailable,
)
from trtllm_workers.ingress.adapters import homes
from trtllm_workers.ingress.placing import Placer
from trtllm_workers.ingress.served import Served, Worker
from trtllm_workers.ingress.text import load_text_model
from trtllm_workers.planes.base import Discovery, Peer, RequestPlane
from trtllm_workers.planes.messages import EventsAsk, KvEvents, StatsAsk, WorkerStats
from trtllm_workers.types import Address, Role, WorkerRecord, WorkerState

log = structlog.get_logger(__name__)

# Ingresses stand in front of a chain; encode workers beside it.
_SERVING = (Role.AGGREGATED, Role.PREFILL, Role.DECODE, Role.ENCODE)
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0


class Fleet:
    """The live workers by model. Use as an async context manager: it owns its tasks.

    ``on_lost(worker, error)`` is called when a connected worker is gone. ``changed`` is set whenever
    what can be served may have changed; whoever waits for it clears it.
    """

    def __init__(
        self,
        plane: RequestPlane,
        discovery: Discovery,
        executor: Executor,
        placer: Placer,
        *,
        on_lost: Callable[[Worker, PeerLost], None],
        model_path: Path | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.placer = placer
        self._plane = plane
        self._discovery = discovery
        self._executor = executor
        self._on_lost = on_lost
        self._model_path = model_path
        self._connect_timeout_s = connect_timeout_s
        self._workers: dict[tuple[str, str], Worker] = {}
        # Connected workers, also those that left discovery and still finish their streams.
        self._by_address: dict[Address, Worker] = {}
        self._followers: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._loaders: dict[str, asyncio.Task[None]] = {}
        self._clashes_told: set[str] = set()
        self.models: dict[str, Served] = {}
        self.adapters: dict[str, Served] = {}
        self.changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        """Follow discovery until the block ends."""
        watcher = _start(self._watch(), "fleet-watch")
        try:
            yield self
        finally:
            tasks = [watcher, *self._followers.values(), *self._loaders.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            try:
                async for records in self._discovery.watch():
                    self.update(records)
                return  # discovery was closed
            except (LaunchError, OSError) as error:
                # Traffic that flows does not need discovery: keep the workers we have.
                log.warning("discovery failed; the known workers stay", error=str(error))
                await asyncio.sleep(LAST_RETRY_S)

    def update(self, records: Collection[WorkerRecord]) -> None:
        """Take the full set of live workers."""
        fresh = {
            (record.worker_id, record.address.incarnation): record
            for record in records
            if record.role in _SERVING
        }
        for key in [key for key in self._workers if key not in fresh]:
            # Its record is gone: no new requests. Its connection ends when the worker does.
            worker = self._workers.pop(key)
            worker.draining = True
            worker.problem = "it left discovery"
            self._followers.pop(key).cancel()
        for key, record in fresh.items():
            known = self._workers.get(key)
            if known is None:
                worker = self._workers[key] = Worker(record)
                self._followers[key] = _start(self._follow(worker), f"follow-{key[0]}")
            elif known.record != record:
                known.record = record
                known.draining = known.draining or record.state is not WorkerState.READY
        self._group()

    def _group(self) -> None:
        """Sort the workers into models and their adapters, and load what is new."""
        for served in (*self.models.values(), *self.adapters.values()):
            served.workers = []
        for worker in self._workers.values():
            name = worker.record.model
            served = self.models.get(name) or Served(name)
            self.models[name] = served
            served.workers.append(worker)
            served.created_s = served.created_s or int(worker.record.started_at_s)
            loader = self._loaders.get(name)
            # The vocabulary's size is known to those that generate.
            generates = worker.role is not Role.ENCODE
            if served.text is None and generates and (loader is None or loader.done()):
                self._loaders[name] = _start(self._load(served, worker.record), f"load-{name}")
        for served in list(self.models.values()):
            prefills = [one.record for one in served.workers if one.role is Role.PREFILL]
            self.placer.prefills(served.name).update(prefills)
            self.placer.makers(served.name).update([one.record for one in served.makers])
            if not served.workers:
                del self.models[served.name]
        self._group_adapters()
        self._tell_changed()

    def _group_adapters(self) -> None:
        """Serve every adapter as a model, by those workers of its base model that hold it."""
        home, clashes = homes([worker.record for worker in self._workers.values()])
        for clash in clashes:
            if clash not in self._clashes_told:
                self._clashes_told.add(clash)
                log.warning("two models of one name", clash=clash)
        known, self.adapters = self.adapters, {}
        for name, base_name in home.items():
            base = self.models[base_name]
            served = known.get(name)
            if served is None or served.base is not base:
                served = Served(name, base)
            self.adapters[name] = served
            served.workers = [w for w in base.workers if name in w.record.engine.loras]
            first_s = min(worker.record.started_at_s for worker in served.workers)
            served.created_s = served.created_s or int(first_s)

    def _tell_changed(self) -> None:
        for served in (*self.models.values(), *self.adapters.values()):
            served.refresh()
            served.has_been_whole |= served.text is not None and served.whole
        for worker in self._workers.values():
            if worker.refused and worker.refused not in self._clashes_told:
                self._clashes_told.add(worker.refused)
                log.error("worker refused", worker_id=worker.worker_id, reason=worker.refused)
            pool = self.placer.pool_of(worker)
            pool.set_open(worker.record.address, worker.takes_requests)
        self.changed.set()

    async def _load(self, served: Served, record: WorkerRecord) -> None:
        folder = self._model_path or Path(record.engine.model_path)
        loop = asyncio.get_running_loop()
        try:
            text = served.text_side.model = await loop.run_in_executor(
                self._executor, load_text_model, folder, record.engine.vocab_size, self._executor
            )
        except Exception as error:  # noqa: BLE001  one broken checkpoint must not stop the others
            served.text_side.problem = f"its tokenizer cannot be loaded: {error}"
            self._tell_changed()
            log.error("model cannot be served", model=served.name, error=str(error))
            return
        self._tell_changed()
        log.info("tokenizer loaded", model=served.name, encoder=text.encoder_name)

    async def _follow(self, worker: Worker) -> None:
        """Keep a connection to one worker for as long as its record lives."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                peer = await self._plane.connect(worker.record.address, self._connect_timeout_s)
            except (PlaneError, OSError) as error:
                if worker.problem != str(error):
                    log.warning("worker unreachable", worker_id=worker.worker_id, error=str(error))
                worker.problem = str(error)
                self._tell_changed()
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, LAST_RETRY_S)
                continue
            retry_s = FIRST_RETRY_S
            worker.lost.clear()
            worker.peer = peer
            with contextlib.suppress(PeerLost):  # then peer_lost is on its way
                peer.send(StatsAsk())
            self._by_address[peer.address] = worker
            worker.problem = ""
            if self.placer.router.follows_events and worker.role is not Role.ENCODE:
                self._ask_for_events(worker)
            self._tell_changed()
            log.info("worker connected", worker_id=worker.worker_id, model=worker.record.model)
            await worker.lost.wait()

    def peer_lost(self, peer: Peer, error: PeerLost) -> None:
        """Take notice that a connection ended."""
        worker = self._by_address.get(peer.address)
        if worker is None or worker.peer is not peer:
            return  # of two connections to one worker, not the one we use
        del self._by_address[peer.address]
        worker.peer = None
        worker.ready_pairs = frozenset()
        worker.problem = str(error)
        worker.lost.set()
        self._tell_changed()
        log.warning("worker lost", worker_id=worker.worker_id, error=str(error))
        self._on_lost(worker, error)

    def peer_drains(self, peer: Peer, reason: str) -> None:
        """Take notice that a worker takes no new requests."""
        worker = self._by_address.get(peer.address)
        if worker is not None:
            worker.draining = True
            worker.problem = reason
            self._tell_changed()

    def peer_stats(self, peer: Peer, load: WorkerStats) -> Worker | None:
        """Keep what a worker says about its load and its pairs; return the worker if it is known."""
        worker = self._by_address.get(peer.address)
        if worker is None:
            return None
        worker.load = load
        self.placer.pool_of(worker).told(worker.record.address, load.stats)
        ready = frozenset(pair.peer for pair in load.pairs if pair.state == "ready")
        if ready != worker.ready_pairs:
            worker.ready_pairs = ready
            self._tell_changed()
        return worker

    def _ask_for_events(self, worker: Worker) -> None:
        """Ask for a snapshot of what a worker has cached, and for every later change."""
        worker.waits_for_events = True
        if worker.record.no_kv_events:
            worker.problem = (
                f"the router needs KV events, and {worker.record.no_kv_events}; mend that, or start "
                "the ingress with --router-events off"
            )
            return
        worker.problem = "its KV events have not come yet"
        worker.events_turn += 1
        with contextlib.suppress(PeerLost):  # then peer_lost is on its way
            if worker.peer is not None:
                worker.peer.send(EventsAsk(worker.events_turn))

    def peer_events(self, peer: Peer, message: KvEvents) -> None:
        """Tell the router what a worker has cached or dropped; after a gap a snapshot is asked for."""
        worker = self._by_address.get(peer.address)
        if worker is None or worker.events_turn != message.turn:
            return
        address = worker.record.address
        pool = self.placer.pool_of(worker)
        if not pool.apply(address, message.events):
            log.warning("KV events were lost; asking anew", worker_id=worker.worker_id)
            worker.num_resyncs += 1
            self._ask_for_events(worker)
            worker.waits_for_events = False  # it works, only its cache is not known for a moment
            worker.problem = ""
        elif worker.waits_for_events and pool.has_snapshot(address):
            worker.waits_for_events = False
            worker.problem = ""
            self._tell_changed()

    def find(self, model: str) -> Served | None:
        """Return a base model or an adapter by its name, ready or not."""
        return self.models.get(model) or self.adapters.get(model)

    def served(self, model: str) -> Served:
        """Return a model that is ready. Raises ModelNotFound, Unavailable."""
        served = self.find(model)
        if served is None:
            known = ", ".join(sorted({*self.models, *self.adapters})) or "none yet"
            raise ModelNotFound(
                f"no model '{model[:200]}' is served here; models: {known}", param="model"
            )
        if not served.ready:
            raise Unavailable(f"model '{model}' is not ready: {served.missing}")
        return served


def _start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_look_at)
    return task


def _look_at(task: asyncio.Task[None]) -> None:
    """Log the end of a task that should have gone on."""
    if not task.cancelled() and task.exception() is not None:
        log.error("fleet task failed", task=task.get_name(), exc_info=task.exception())

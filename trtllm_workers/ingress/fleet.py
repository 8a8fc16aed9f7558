"""Which workers live, for which model, and which of them takes the next request.

Follows discovery, keeps a connection to every worker, and loads a model's tokenizer when its first
worker appears. Knows no request's text and no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import structlog

from trtllm_workers.errors import (
    LaunchError,
    ModelNotFound,
    NotSupported,
    PeerLost,
    PlaneError,
    Unavailable,
)
from trtllm_workers.ingress.adapters import homes
from trtllm_workers.ingress.served import Placement, Served, Worker
from trtllm_workers.ingress.text import load_text_model
from trtllm_workers.planes.base import Discovery, Peer, RequestPlane
from trtllm_workers.planes.messages import StatsAsk, WorkerStats
from trtllm_workers.types import Address, Role, Strategy, WorkerRecord, WorkerState

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0

# Capability → what an operator does to have it, where that is more than another engine.
_REMEDIES = {
    "guided": "; guided decoding needs workers of engine trtllm whose engine config sets "
    "guided_decoding_backend",
}


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
        *,
        on_lost: Callable[[Worker, PeerLost], None],
        model_path: Path | None = None,
        connect_timeout_s: float = 5.0,
        strategy: Strategy = Strategy.DECODE_FIRST,
    ) -> None:
        self._strategy = strategy
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
        self._turns: Counter[Role] = Counter()
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
            if record.role is not Role.ENCODE
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
            if served.text is None and (loader is None or loader.done()):
                self._loaders[name] = _start(self._load(served, worker.record), f"load-{name}")
        for name in [name for name, served in self.models.items() if not served.workers]:
            del self.models[name]
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
            served.has_been_whole |= served.text is not None and served.whole
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
        ready = frozenset(pair.peer for pair in load.pairs if pair.state == "ready")
        if ready != worker.ready_pairs:
            worker.ready_pairs = ready
            self._tell_changed()
        return worker

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

    def place(
        self,
        served: Served,
        needs: Collection[str],
        exclude: Worker | None = None,
        *,
        num_prompt_tokens: int = 0,
        client_field: Callable[[str], str] = str,
    ) -> Placement:
        """Return the workers with the fewest of our streams; equal ones take turns.

        Raises Unavailable when none takes requests, NotSupported naming the first sampling field
        of ``needs`` that none of them honours, as the client called it (``client_field``).
        """
        able = [w for w in served.makers if w.takes_requests and w is not exclude]
        if not able and exclude is not None and exclude.role is Role.DECODE:
            # It may have been the prefill worker's fault, and there is no other decode worker.
            able = [exclude] if exclude.takes_requests else []
        if not able:
            raise Unavailable(f"model '{served.name}' has no worker left: {served.missing}")
        for field in needs:
            able = [worker for worker in able if field in worker.record.engine.capabilities]
            if not able:
                named = client_field(field)
                raise NotSupported(
                    f"'{named}' is not supported by the engine that serves '{served.name}'"
                    + _REMEDIES.get(field, ""),
                    param=named,
                )
        paired = [w for w in able if w.role is not Role.DECODE or served.is_paired(w)]
        maker = self._least(paired or able)
        if maker.role is not Role.DECODE or self._strategy is Strategy.DECODE_FIRST:
            return Placement(maker)
        if num_prompt_tokens <= maker.record.max_local_prefill_length:
            return Placement(maker)
        prefills = [
            worker
            for worker in served.workers
            if worker.takes_requests
            and worker is not exclude
            and worker.record.address in maker.ready_pairs
            # It chooses the first token. When none can, decode computes the prompt itself.
            and all(field in worker.record.engine.capabilities for field in needs)
        ]
        return Placement(self._least(prefills), maker) if prefills else Placement(maker)

    def _least(self, workers: list[Worker]) -> Worker:
        fewest = min(worker.in_flight for worker in workers)
        least = [worker for worker in workers if worker.in_flight == fewest]
        role = least[0].role  # turns of their own: one request takes a worker of each role
        self._turns[role] += 1
        return least[self._turns[role] % len(least)]


def _start(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_look_at)
    return task


def _look_at(task: asyncio.Task[None]) -> None:
    """Log the end of a task that should have gone on."""
    if not task.cancelled() and task.exception() is not None:
        log.error("fleet task failed", task=task.get_name(), exc_info=task.exception())

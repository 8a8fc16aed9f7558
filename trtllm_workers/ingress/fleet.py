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
from dataclasses import dataclass
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
from trtllm_workers.ingress.text import TextModel, load_text_model
from trtllm_workers.planes.base import Discovery, Peer, RequestPlane
from trtllm_workers.planes.messages import StatsAsk, WorkerStats
from trtllm_workers.types import Address, Role, Strategy, WorkerRecord, WorkerState

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0


class Worker:
    """One worker as this ingress sees it. ``in_flight`` counts our own streams on it."""

    def __init__(self, record: WorkerRecord) -> None:
        self.record = record
        self.peer: Peer | None = None
        self.in_flight = 0
        self.draining = record.state is not WorkerState.READY
        self.problem = "not connected yet"
        self.load: WorkerStats | None = None
        self.lost = asyncio.Event()
        self.ready_pairs: frozenset[Address] = frozenset()

    @property
    def worker_id(self) -> str:
        """The worker's name in discovery."""
        return self.record.worker_id

    @property
    def role(self) -> Role:
        """What it does."""
        return self.record.role

    @property
    def takes_requests(self) -> bool:
        """True while a new request may be sent to it."""
        return self.peer is not None and not self.draining

    @property
    def state(self) -> str:
        """What people are shown."""
        if self.peer is None:
            return "unreachable"
        return "draining" if self.draining else "ready"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes: to ``worker``, which with ``decode`` set prefills and hands over to that."""

    worker: Worker
    decode: Worker | None = None


class Served:
    """One served model: its text side and its workers, of whatever role."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text: TextModel | None = None
        self.problem = "its tokenizer is being loaded"
        self.created_s = 0
        self.workers: list[Worker] = []
        self.has_been_whole = False

    @property
    def ready(self) -> bool:
        """True when a request for it can be served.

        That takes a whole chain once: an aggregated worker, or a decode worker with a prefill worker
        that has passed its gate. When all prefill workers go later, decode workers do their work.
        """
        if self.text is None or not (self.whole or self.has_been_whole):
            return False
        return any(worker.takes_requests for worker in self.makers)

    @property
    def whole(self) -> bool:
        """True when a chain is up from the first worker to the last."""
        return any(
            worker.takes_requests and (worker.role is not Role.DECODE or worker.ready_pairs)
            for worker in self.makers
        )

    @property
    def makers(self) -> list[Worker]:
        """The workers that stream tokens: aggregated and decode ones."""
        return [worker for worker in self.workers if worker.role is not Role.PREFILL]

    @property
    def max_seq_len(self) -> int:
        """What every worker of this model can hold, in tokens."""
        return min(worker.record.engine.max_seq_len for worker in self.workers)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return min(worker.record.engine.vocab_size for worker in self.workers)

    @property
    def missing(self) -> str:
        """Why it is not ready, or not whole, for people."""
        if self.text is None:
            return self.problem
        problems = [
            f"worker {worker.worker_id} is {worker.state}: {worker.problem}"
            for worker in self.workers
            if not worker.takes_requests
        ]
        problems += [
            f"decode worker {worker.worker_id} has no prefill worker: {_why_unpaired(worker)}"
            for worker in self.makers
            if worker.takes_requests and worker.role is Role.DECODE and not worker.ready_pairs
        ]
        if not self.makers:
            problems.append("no decode worker has registered")
        return "; ".join(problems) or "no worker serves it"


def _why_unpaired(worker: Worker) -> str:
    if worker.load is None:
        return "it has not told yet"
    pairs = [f"{one.peer.peer_id} {one.state}: {one.reason}" for one in worker.load.pairs]
    return "; ".join(pairs) or "none has registered"


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
        self.models: dict[str, Served] = {}
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
        """Sort the workers into models and load what is new."""
        for served in self.models.values():
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
        self._tell_changed()

    def _tell_changed(self) -> None:
        for served in self.models.values():
            served.has_been_whole |= served.text is not None and served.whole
        self.changed.set()

    async def _load(self, served: Served, record: WorkerRecord) -> None:
        folder = self._model_path or Path(record.engine.model_path)
        loop = asyncio.get_running_loop()
        try:
            served.text = await loop.run_in_executor(
                self._executor, load_text_model, folder, record.engine.vocab_size, self._executor
            )
        except Exception as error:  # noqa: BLE001  one broken checkpoint must not stop the others
            served.problem = f"its tokenizer cannot be loaded: {error}"
            self._tell_changed()
            log.error("model cannot be served", model=served.name, error=str(error))
            return
        self._tell_changed()
        log.info("tokenizer loaded", model=served.name, encoder=served.text.encoder_name)

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

    def served(self, model: str) -> Served:
        """Return a model that is ready. Raises ModelNotFound, Unavailable."""
        served = self.models.get(model)
        if served is None:
            known = ", ".join(sorted(self.models)) or "none yet"
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
    ) -> Placement:
        """Return the workers with the fewest of our streams; equal ones take turns.

        Raises Unavailable when none takes requests, NotSupported naming the first sampling field
        of ``needs`` that none of them honours.
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
                raise NotSupported(
                    f"'{field}' is not supported by the engine that serves '{served.name}'",
                    param=field,
                )
        paired = [w for w in able if w.role is not Role.DECODE or w.ready_pairs]
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

"""Workers as a model on a virtual clock: prefix caches with LRU, one prompt computed at a time.

Runs a trace through a real ``router.Pool`` and tells hit rate and TTFT. No process, no socket, no time
passes. Knows no engine: a prompt costs its uncached tokens, an answer its tokens, and a worker holds so
many blocks; events reach the router late, and loads once a second, as they do in a deployment.
"""

from __future__ import annotations

import heapq
import itertools
import random
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.traces import TraceRequest
from trtllm_workers.blocks import block_hashes, root_hash
from trtllm_workers.router.pool import Charge, Pool, Query
from trtllm_workers.router.router import Router
from trtllm_workers.types import (
    Address,
    EngineInfo,
    EngineStats,
    KvEvent,
    KvEventKind,
    Role,
    WorkerRecord,
)

MODEL_ID = "model"


@dataclass(frozen=True, slots=True)
class Costs:
    """What a worker is: its cache, and seconds per prompt token and per answer token when idle.

    Each request that it answers makes everything ``slower_by`` slower.
    """

    block_size: int = 32
    num_blocks: int = 2048
    prompt_token_s: float = 100e-6
    output_token_s: float = 10e-3
    slower_by: float = 1 / 32
    event_delay_s: float = 5e-3
    load_every_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a trace."""

    prompt_tokens: int
    cached_tokens: int
    ttfts_s: list[float]
    requests_by_worker: Counter[str]

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that were not computed, of all."""
        return self.cached_tokens / self.prompt_tokens

    def ttft_s(self, percent: int) -> float:
        """Return a percentile of the times to first token."""
        return statistics.quantiles(self.ttfts_s, n=100, method="inclusive")[percent - 1]


def record(worker_id: str, costs: Costs, incarnation: str = "1") -> WorkerRecord:
    """Return what discovery would tell of such a worker."""
    return WorkerRecord(
        worker_id=worker_id,
        model="model",
        role=Role.AGGREGATED,
        address=Address("host", 1, worker_id, incarnation),
        engine=EngineInfo(
            engine="model",
            model_path="",
            model_id=MODEL_ID,
            block_size=costs.block_size,
            num_blocks=costs.num_blocks,
            max_seq_len=1_000_000,
            max_batch_size=256,
            max_num_tokens=8192,
            vocab_size=1_000_000,
            kv_events=True,
        ),
    )


class Cache:
    """A prefix cache: blocks by hash, those of running requests pinned, the others in order of use."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pins: Counter[bytes] = Counter()
        self.idle: OrderedDict[bytes, None] = OrderedDict()
        self.changes: list[tuple[KvEventKind, tuple[bytes, ...]]] = []

    def leading(self, hashes: Sequence[bytes]) -> int:
        """Return how many leading blocks are here."""
        found = 0
        for block in hashes:
            if block not in self.pins and block not in self.idle:
                break
            found += 1
        return found

    def pin(self, hashes: Sequence[bytes]) -> None:
        """Hold a prompt's blocks; what is not there is stored, and the longest unused evicted for it."""
        new = tuple(one for one in hashes if one not in self.pins and one not in self.idle)
        for block in hashes:
            self.pins[block] += 1
            self.idle.pop(block, None)
        gone = []
        while self.idle and len(self.pins) + len(self.idle) > self.num_blocks:
            gone.append(self.idle.popitem(last=False)[0])
        if gone:
            self.changes.append((KvEventKind.REMOVED, tuple(gone)))
        if new:
            self.changes.append((KvEventKind.STORED, new))

    def unpin(self, hashes: Sequence[bytes]) -> None:
        """Let go of a prompt's blocks; its last ones will be evicted first."""
        for block in reversed(hashes):
            self.pins[block] -= 1
            if not self.pins[block]:
                del self.pins[block]
                self.idle[block] = None


@dataclass(eq=False)
class _Job:
    request: TraceRequest
    hashes: list[bytes]
    charge: Charge
    came_s: float


@dataclass(eq=False)
class _Worker:
    record: WorkerRecord
    cache: Cache
    waiting: deque[_Job] = field(default_factory=deque)
    computing: bool = False
    running: int = 0
    seq: int = 0

    @property
    def address(self) -> Address:
        return self.record.address

    def stats(self) -> EngineStats:
        """Return what it would tell of itself."""
        used, cached = len(self.cache.pins), len(self.cache.idle)
        return EngineStats(
            num_running=self.running,
            num_waiting=len(self.waiting),
            total_blocks=self.cache.num_blocks,
            free_blocks=max(0, self.cache.num_blocks - used - cached),
            cached_blocks=cached,
            active_blocks=used,
        )


class Simulation:
    """Some workers behind one pool of a router."""

    def __init__(
        self, make_router: Callable[[Callable[[], float]], Router], num_workers: int, costs: Costs
    ) -> None:
        self.costs = costs
        self.now_s = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        router = make_router(lambda: self.now_s)
        self.pool: Pool = router.pool("pool")
        self._follows_events = router.follows_events
        self.workers = {
            made.address: _Worker(made, Cache(costs.num_blocks))
            for made in (record(f"w{index}", costs) for index in range(num_workers))
        }
        self.pool.update([worker.record for worker in self.workers.values()])
        for address in self.workers:
            self.pool.set_open(address, True)
            if self._follows_events:
                self.pool.apply(address, [KvEvent(seq=0, kind=KvEventKind.CLEARED)])
        self._root = root_hash(MODEL_ID)
        self._left = 0
        self._outcome = Outcome(0, 0, [], Counter())
        self._prompt_tokens = self._cached_tokens = 0

    def run(self, trace: Sequence[TraceRequest]) -> Outcome:
        """Send a trace and return what came of it, once all answers have ended."""
        self._left = len(trace)
        for request in trace:
            self._at(request.at_s, lambda request=request: self._send(request))  # type: ignore[misc]
        self._at(self.costs.load_every_s, self._tell_loads)
        while self._agenda and self._left:
            self.now_s, _, act = heapq.heappop(self._agenda)
            act()
        done = self._outcome
        return Outcome(
            self._prompt_tokens, self._cached_tokens, done.ttfts_s, done.requests_by_worker
        )

    def _at(self, when_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (when_s, next(self._count), act))

    def _after(self, wait_s: float, act: Callable[[], None]) -> None:
        self._at(self.now_s + wait_s, act)

    def _send(self, request: TraceRequest) -> None:
        query = Query(request.prompt_token_ids)
        choice = self.pool.place(query)
        assert choice is not None, "all workers are open"
        charge = self.pool.charge(choice, query)
        hashes = block_hashes(request.prompt_token_ids, self.costs.block_size, self._root)
        worker = self.workers[choice.address]
        self._outcome.requests_by_worker[choice.worker_id] += 1
        worker.waiting.append(_Job(request, hashes, charge, self.now_s))
        self._compute(worker)

    def _compute(self, worker: _Worker) -> None:
        """Begin with the next prompt, if none is being computed."""
        if worker.computing or not worker.waiting:
            return
        job = worker.waiting.popleft()
        worker.computing = True
        worker.running += 1
        prompt_tokens = len(job.request.prompt_token_ids)
        held = worker.cache.leading(job.hashes) * self.costs.block_size
        cached = min(held, prompt_tokens - 1)
        self._prompt_tokens += prompt_tokens
        self._cached_tokens += cached
        compute_s = (prompt_tokens - cached) * self.costs.prompt_token_s
        self._after(compute_s * self._slowness(worker), lambda: self._first(worker, job))

    def _first(self, worker: _Worker, job: _Job) -> None:
        """The first token is there."""
        worker.cache.pin(job.hashes)
        self._tell_changes(worker)
        self._outcome.ttfts_s.append(self.now_s - job.came_s)
        job.charge.computed()
        worker.computing = False
        answer_s = job.request.output_tokens * self.costs.output_token_s
        self._after(answer_s * self._slowness(worker), lambda: self._end(worker, job))
        self._compute(worker)

    def _slowness(self, worker: _Worker) -> float:
        return 1.0 + self.costs.slower_by * worker.running

    def _end(self, worker: _Worker, job: _Job) -> None:
        worker.cache.unpin(job.hashes)
        worker.running -= 1
        job.charge.ended()
        self._left -= 1

    def _tell_changes(self, worker: _Worker) -> None:
        events = []
        for kind, hashes in worker.cache.changes:
            worker.seq += 1
            events.append(KvEvent(seq=worker.seq, kind=kind, block_hashes=hashes))
        worker.cache.changes.clear()
        if events and self._follows_events:
            self._after(self.costs.event_delay_s, lambda: self._check(worker.address, events))

    def _check(self, address: Address, events: list[KvEvent]) -> None:
        assert self.pool.apply(address, events), "no event is lost here"

    def _tell_loads(self) -> None:
        for worker in self.workers.values():
            self.pool.told(worker.address, worker.stats())
        self._after(self.costs.load_every_s, self._tell_loads)


def simulate(
    trace: Sequence[TraceRequest],
    make_router: Callable[[Callable[[], float], random.Random], Router],
    *,
    num_workers: int = 4,
    costs: Costs = Costs(),
    seed: int = 0,
) -> Outcome:
    """Return what comes of a trace. ``make_router`` gets the virtual clock and a seeded generator."""
    rng = random.Random(seed)
    return Simulation(lambda now: make_router(now, rng), num_workers, costs).run(trace)

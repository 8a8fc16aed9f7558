"""Workers, events and pools to test the router with."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.simulated_workers import Costs
from benchmarks.simulated_workers import record as record_of
from trtllm_workers.blocks import block_hashes, namespace, root_hash
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.pool import Charge, Choice, Pool, Query
from trtllm_workers.router.router import Router
from trtllm_workers.router.weights import Weights
from trtllm_workers.types import Address, EngineStats, KvEvent, KvEventKind, WorkerRecord

BLOCK = 4


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def record(worker_id: str, incarnation: str = "1", num_blocks: int = 1000) -> WorkerRecord:
    return record_of(worker_id, Costs(block_size=BLOCK, num_blocks=num_blocks), incarnation)


def address(worker_id: str, incarnation: str = "1") -> Address:
    return record(worker_id, incarnation).address


def hashes(tokens: Sequence[int], salt: str = "", lora: str = "") -> tuple[bytes, ...]:
    return tuple(block_hashes(tokens, BLOCK, root_hash("model", namespace(salt, lora))))


def cleared(seq: int = 0) -> KvEvent:
    return KvEvent(seq=seq, kind=KvEventKind.CLEARED)


def stored(seq: int, blocks: Sequence[bytes]) -> KvEvent:
    return KvEvent(seq=seq, kind=KvEventKind.STORED, block_hashes=tuple(blocks))


def removed(seq: int, blocks: Sequence[bytes]) -> KvEvent:
    return KvEvent(seq=seq, kind=KvEventKind.REMOVED, block_hashes=tuple(blocks))


def told(running: int = 0, waiting: int = 0, available: int = 1000) -> EngineStats:
    return EngineStats(num_running=running, num_waiting=waiting, free_blocks=available)


def open_pool(
    mode: RouterMode = RouterMode.KV,
    num_workers: int = 3,
    *,
    weights: Weights = Weights(),  # noqa: B008 - frozen
    uses_events: bool = True,
    clock: Clock | None = None,
    num_blocks: int = 1000,
    seed: int = 1,
) -> Pool:
    """Return a pool of open workers w0, w1, … that hold nothing."""
    router = Router(
        mode, weights, uses_events=uses_events, now=clock or Clock(), rng=random.Random(seed)
    )
    pool = router.pool("pool")
    fill(pool, [record(f"w{index}", num_blocks=num_blocks) for index in range(num_workers)])
    return pool


def fill(pool: Pool, records: Sequence[WorkerRecord]) -> None:
    """Let a pool have these workers, open, with a snapshot of nothing if they are new."""
    pool.update(records)
    for one in records:
        pool.set_open(one.address, True)
        if not pool.has_snapshot(one.address):
            pool.apply(one.address, [cleared()])


def place(pool: Pool, tokens: Sequence[int]) -> Choice:
    choice = pool.place(Query(tokens))
    assert choice is not None
    return choice


def send(pool: Pool, tokens: Sequence[int]) -> tuple[Choice, Charge]:
    """Place a prompt and charge it."""
    query = Query(tokens)
    choice = pool.place(query)
    assert choice is not None
    return choice, pool.charge(choice, query)


def send_to(pool: Pool, worker_id: str, tokens: Sequence[int]) -> Charge:
    """Send a prompt to one worker, whatever it costs there."""
    query = Query(tokens)
    choice = pool.place(query, allowed=frozenset([address(worker_id)]))
    assert choice is not None
    return pool.charge(choice, query)


def overlap(pool: Pool, worker_id: str, tokens: Sequence[int]) -> int:
    """Return how many tokens of a prompt the pool believes a worker to hold."""
    choice = pool.place(Query(tokens), allowed=frozenset([address(worker_id)]))
    assert choice is not None
    return choice.overlap_tokens

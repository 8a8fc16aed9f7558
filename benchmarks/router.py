"""The router's index: 1,000,000 KV blocks over 1,000 workers, beside a peer written in Rust.

    .venv/bin/python -m benchmarks.router
    pip install --no-deps --target /tmp/peer ai-dynamo-runtime    # once, anywhere outside this folder
    PYTHONPATH=/tmp/peer .venv/bin/python -m benchmarks.router

Measured from the caller's side: token ids in, ranked workers out, hashing included, prompts of 4,096
tokens in blocks of 32. The peer is ``RadixTree`` with its own hash function; what it does not do, a
choice among the workers, is done by this router's cost formula. Events go in as bytes, as they come from
a wire: msgpack here, JSON there. Each side runs in a process of its own. Traces through modelled workers
(``simulated_workers.py``) follow.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.simulated_workers import MODEL_ID, Costs, record, simulate
from benchmarks.traces import chats, strangers
from trtllm_workers.blocks import HASH_BYTES, block_hashes, root_hash
from trtllm_workers.router.cost import Columns, Mask, cheapest, costs
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.router.pool import Query
from trtllm_workers.router.router import Router
from trtllm_workers.router.weights import Weights
from trtllm_workers.types import KvEvent, KvEventKind

PEER = "ai-dynamo-runtime"
PEER_MODULE = "dynamo._core"
BLOCK = 32
PROMPT_TOKENS = 4096
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK
# Blocks of one stored event: a prompt of about 3,000 tokens.
RUN_BLOCKS = 100
CASES = ("full hit on one worker", "shared prefix on all workers", "no hit")
Figures = dict[str, float]


def prompts(seed: int, count: int) -> list[array[int]]:
    """Return prompts that share nothing."""
    rng = random.Random(seed)
    return [array("I", rng.choices(range(256, 150_000), k=PROMPT_TOKENS)) for _ in range(count)]


def rss_bytes() -> int:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def median_us(
    rank: Callable[[list[int]], int], asked: list[array[int]], expect: int | None
) -> Figures:
    """Return p50 and p99 of ranking fresh lists of token ids. ``expect`` is who must be chosen."""
    times = []
    for prompt in asked:
        tokens = prompt.tolist()
        began = time.perf_counter()
        chosen = rank(tokens)
        times.append(time.perf_counter() - began)
        assert expect is None or chosen == expect
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": cuts[49] * 1e6, "p99": cuts[98] * 1e6}


def measure_ours(num_workers: int, num_blocks: int, queries: int) -> dict[str, Figures]:
    """Measure this router."""
    pool = Router(RouterMode.KV).pool("pool")
    workers = [
        record(f"w{index}", Costs(block_size=BLOCK, num_blocks=10**6))
        for index in range(num_workers)
    ]
    pool.update(workers)
    for worker in workers:
        pool.set_open(worker.address, True)
    runs = num_blocks // num_workers // RUN_BLOCKS
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.Decoder(list[KvEvent]).decode
    frames = []
    for _ in workers:
        events = [KvEvent(seq=0, kind=KvEventKind.CLEARED)]
        for seq in range(1, runs + 1):
            blocks = tuple(os.urandom(HASH_BYTES) for _ in range(RUN_BLOCKS))
            events.append(KvEvent(seq=seq, kind=KvEventKind.STORED, block_hashes=blocks))
        frames.append(encode(events))
    del events, blocks
    gc.collect()
    before, applying_s, began = rss_bytes(), 0.0, time.perf_counter()
    for worker, frame in zip(workers, frames, strict=True):
        told = decode(frame)
        began_apply = time.perf_counter()
        pool.apply(worker.address, told)
        applying_s += time.perf_counter() - began_apply
    took_s = time.perf_counter() - began
    del told
    total = runs * RUN_BLOCKS * num_workers
    found: dict[str, Figures] = {
        "events": {
            "blocks/s": total / took_s,
            "blocks/s decoded": total / applying_s,
            "bytes/block": (rss_bytes() - before) / total,
        }
    }
    root = root_hash(MODEL_ID)
    held, shared = prompts(1, min(queries, num_workers)), prompts(2, 1)[0]
    seqs = dict.fromkeys((worker.address for worker in workers), runs)

    def store(index: int, tokens: array[int]) -> None:
        address = workers[index].address
        seqs[address] += 1
        blocks = tuple(block_hashes(tokens, BLOCK, root))
        pool.apply(
            address, [KvEvent(seq=seqs[address], kind=KvEventKind.STORED, block_hashes=blocks)]
        )

    for index, prompt in enumerate(held):
        store(index, prompt)
    for index in range(num_workers):
        store(index, shared)

    def rank(tokens: list[int]) -> int:
        choice = pool.place(Query(tokens))
        assert choice is not None
        return choice.overlap_tokens

    full = PROMPT_TOKENS - 1
    for case, asked, overlap in zip(
        CASES, (held, [shared] * queries, prompts(3, queries)), (full, full, 0), strict=True
    ):
        found[case] = median_us(rank, asked, overlap)
    charging = []
    for prompt in prompts(4, queries):
        query = Query(prompt.tolist())
        choice = pool.place(query)
        assert choice is not None
        began = time.perf_counter()
        pool.charge(choice, query)
        charging.append(time.perf_counter() - began)
    found["charge, no hit"] = {"p50": statistics.median(charging) * 1e6}
    found["full hit, requests on their way"] = median_us(rank, held, None)
    return found


def measure_peer(num_workers: int, num_blocks: int, queries: int) -> dict[str, Figures]:
    """Measure the peer: its tree, its hash function, and a choice by our formula over its scores."""
    core: Any = importlib.import_module(PEER_MODULE)
    tree, hash_of = core.RadixTree(), core.compute_block_hash_for_seq
    rng = random.Random(0)

    def stored(event_id: int, local: list[int]) -> bytes:
        # The tree finds by hashes of tokens; its chained hashes only name the blocks in events.
        blocks = [{"block_hash": rng.getrandbits(63), "tokens_hash": one} for one in local]
        what = {"stored": {"parent_hash": None, "blocks": blocks}}
        return json.dumps({"event_id": event_id, "data": what}).encode()

    runs = num_blocks // num_workers // RUN_BLOCKS
    events = [
        (worker, stored(run, [rng.getrandbits(63) for _ in range(RUN_BLOCKS)]))
        for worker in range(num_workers)
        for run in range(runs)
    ]
    gc.collect()
    before, began = rss_bytes(), time.perf_counter()
    for worker, event in events:
        tree.apply_event(worker, event)
    handed_s = time.perf_counter() - began
    tree.find_matches([1])  # answered once all events before it are in
    took_s = time.perf_counter() - began
    total = runs * RUN_BLOCKS * num_workers
    found: dict[str, Figures] = {
        "events": {
            "blocks/s": total / took_s,
            "blocks/s handed over": total / handed_s,
            "bytes/block": (rss_bytes() - before) / total,
        }
    }
    held, shared = prompts(1, min(queries, num_workers)), prompts(2, 1)[0]
    for index, prompt in enumerate(held):
        tree.apply_event(index, stored(runs, hash_of(prompt.tolist(), BLOCK)))
    same = [rng.getrandbits(63) for _ in range(PROMPT_BLOCKS)]
    pairs = zip(same, hash_of(shared.tolist(), BLOCK), strict=True)
    blocks = [{"block_hash": block, "tokens_hash": local} for block, local in pairs]
    what = {"stored": {"parent_hash": None, "blocks": blocks}}
    event = json.dumps({"event_id": runs + 1, "data": what}).encode()
    for index in range(num_workers):
        tree.apply_event(index, event)

    zeros, turns = np.zeros(num_workers), np.zeros(num_workers)
    mask = Mask(num_workers, np.ones(num_workers), zeros)
    columns = Columns(zeros, zeros, np.full(num_workers, 1e6), mask)
    weights = Weights()

    def find(tokens: list[int]) -> int:
        scores = tree.find_matches(hash_of(tokens, BLOCK)).scores
        return max(scores.values(), default=0)

    def rank(tokens: list[int]) -> int:
        scores = tree.find_matches(hash_of(tokens, BLOCK)).scores
        overlap = np.zeros(num_workers)
        for (worker, _), blocks in scores.items():
            overlap[worker] = blocks * BLOCK
        np.minimum(overlap, PROMPT_TOKENS - 1, out=overlap)
        priced = costs(columns, overlap, PROMPT_TOKENS, BLOCK, weights)
        return int(overlap[cheapest(priced.total, turns)])

    full = PROMPT_TOKENS - 1
    for case, asked, overlap, most in zip(
        CASES,
        (held, [shared] * queries, prompts(3, queries)),
        (full, full, 0),
        (PROMPT_BLOCKS, PROMPT_BLOCKS, 0),
        strict=True,
    ):
        found[case] = median_us(rank, asked, overlap)
        found[f"{case}: without the choice"] = median_us(find, asked, most)
    hashing = median_us(lambda tokens: len(hash_of(tokens, BLOCK)), held, PROMPT_BLOCKS)
    found["its hashes alone"] = hashing
    return found


def show(title: str, measured: dict[str, Figures]) -> None:
    """Print the figures of one side."""
    print(f"\n{title}")
    for what, figures in measured.items():
        line = ", ".join(
            f"{name} {value:,.0f}" + (" µs" if name in ("p50", "p99") else "")
            for name, value in figures.items()
        )
        print(f"  {what:<44} {line}")


def show_traces() -> None:
    """Print hit rate and TTFT of each router mode over modelled workers."""
    small = Costs(num_blocks=700)
    for title, trace, modelled in (
        (
            "chats, caches too small for all",
            chats(seed=1, num_chats=80, turns=8, system_tokens=256, chats_per_s=2.5),
            small,
        ),
        ("chats, caches large enough", chats(seed=1, num_chats=80, chats_per_s=2.5), Costs()),
        (
            "prompts that share nothing",
            strangers(seed=1, count=800, requests_per_s=20),
            Costs(num_blocks=8000),
        ),
    ):
        print(f"\n4 modelled workers, {title}: {len(trace)} requests")
        for mode in RouterMode:
            came = simulate(trace, partial(_router, mode), costs=modelled)
            print(
                f"  {mode:<14} hit rate {came.hit_rate:.3f}   TTFT p50 {came.ttft_s(50) * 1e3:4.0f} ms"
                f"   p90 {came.ttft_s(90) * 1e3:4.0f} ms"
            )


def _router(mode: RouterMode, now: Callable[[], float], rng: random.Random) -> Router:
    return Router(mode, now=now, rng=rng)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=300, help="per case")
    given = parser.parse_args()
    sizes = (given.workers, given.blocks, given.queries)
    print(
        f"{given.blocks:,} blocks over {given.workers:,} workers, {PROMPT_TOKENS:,}-token prompts"
    )
    processes = multiprocessing.get_context("spawn")
    with processes.Pool(1, maxtasksperchild=1) as one:
        show("this router", one.apply(measure_ours, sizes))
        if _has_peer():
            show(f"{PEER}: RadixTree, in Rust", one.apply(measure_peer, sizes))
        else:
            print(
                f"\nThe peer is not installed, so it was not measured. To have it:\n"
                f"  pip install --no-deps --target /tmp/peer {PEER}\n"
                f"  PYTHONPATH=/tmp/peer .venv/bin/python -m benchmarks.router"
            )
    show_traces()


def _has_peer() -> bool:
    try:
        return importlib.util.find_spec(PEER_MODULE) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()

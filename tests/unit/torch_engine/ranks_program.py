"""What the ranks of a test's MPI world run: a list of jobs, each with an engine of its own.

``python -m mpi4py -m tests.unit.torch_engine.ranks_program JOBS RESULTS``: rank 0 writes what the
jobs returned to RESULTS as JSON. Holds no test.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.unit.torch_engine.driver import prompt_of, request_of
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.base import EngineOptions, generate
from trtllm_workers.engines.torch import shared_pages
from trtllm_workers.engines.torch.core import Core
from trtllm_workers.engines.torch.engine import TorchEngine
from trtllm_workers.engines.torch.ranks import join, run_follower
from trtllm_workers.engines.torch.scheduler import Scheduler, Step
from trtllm_workers.engines.torch.settings import KEYS
from trtllm_workers.errors import LaunchError
from trtllm_workers.types import Prefilled, Reservation, TokenChunk

Job = Callable[[TorchEngine, dict[str, Any]], Awaitable[Any]]


async def ask(engine: TorchEngine, subject: dict[str, Any]) -> list[Any]:
    """Return the tokens and log probabilities of a subject: prompt seed and length, sampling."""
    prompt = prompt_of(subject["seed"], subject["length"])
    chunks = [c async for c in generate(engine, request_of(prompt, **subject["sampling"]))]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    return [tokens, [entry.logprob for chunk in chunks for entry in chunk.logprobs or ()]]


async def alone(engine: TorchEngine, job: dict[str, Any]) -> Any:
    return [await ask(engine, subject) for subject in job["subjects"]]


async def together(engine: TorchEngine, job: dict[str, Any]) -> Any:
    return await asyncio.gather(*(ask(engine, subject) for subject in job["subjects"]))


async def abort_storm(engine: TorchEngine, job: dict[str, Any]) -> Any:
    """Abort requests in every phase; return what is left, and an answer after all that."""
    prefilled: asyncio.Queue[tuple[str, Prefilled]] = asyncio.Queue()
    reserved: asyncio.Queue[tuple[str, Reservation]] = asyncio.Queue()
    ids = []
    for index in range(job["count"]):
        request = request_of(prompt_of(index % 5, 10 + 7 * (index % 11)), 20)
        ids.append(key := request.request_id)
        if index % 3 == 0:
            engine.submit(request, lambda _chunk: None)
        elif index % 3 == 1:
            engine.prefill(request, lambda made, key=key: prefilled.put_nowait((key, made)))  # type: ignore[misc]
        else:
            engine.reserve(request, lambda room, key=key: reserved.put_nowait((key, room)))  # type: ignore[misc]
        if index % 4 == 0:
            engine.abort(key)
        if index % 10 == 9:
            await engine.holdings()
    key, made = await prefilled.get()
    while made.first.finish_reason is not None:
        key, made = await prefilled.get()
    engine.release(key)
    resumed, room = await reserved.get()
    while room.ended is not None:
        resumed, room = await reserved.get()
    engine.resume(resumed, None, lambda _chunk: None)
    for request_id in ids:
        engine.abort(request_id)
    held = dict(await engine.holdings())
    answer = await ask(engine, job["subjects"][0])
    await engine.holdings()
    stats = engine.stats()
    left = [stats.active_blocks, stats.allocated_blocks - stats.freed_blocks]
    return {"held": held, "left": left, "aborts": stats.aborts, "answer": answer}


async def prefill(engine: TorchEngine, job: dict[str, Any]) -> Any:
    """Compute a prompt and write its blocks to a file."""
    told: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
    request = request_of(prompt_of(job["seed"], job["length"]), **job["sampling"])
    engine.prefill(request, told.set_result)
    made = await told
    pool = engine.kv_pool
    assert pool is not None
    blocks = b"".join(bytes(pool.block(block)) for block in made.block_ids)
    await asyncio.to_thread(Path(job["file"]).write_bytes, blocks)
    engine.release(request.request_id)
    assert engine.stats().total_blocks == pool.num_blocks
    return {"tokens": list(made.first.token_ids), "layout": str(pool.layout)}


async def resume(engine: TorchEngine, job: dict[str, Any]) -> Any:
    """Go on from the blocks in a file; return the tokens."""
    loop = asyncio.get_running_loop()
    reserved: asyncio.Future[Reservation] = loop.create_future()
    ended: asyncio.Future[None] = loop.create_future()
    tokens: list[int] = []

    def take(chunk: TokenChunk) -> None:
        tokens.extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            ended.set_result(None)

    request = request_of(prompt_of(job["seed"], job["length"]), **job["sampling"])
    engine.reserve(request, reserved.set_result)
    room = await reserved
    pool = engine.kv_pool
    assert pool is not None
    content, size = await asyncio.to_thread(Path(job["file"]).read_bytes), pool.layout.block_bytes
    for index, block in enumerate(room.block_ids):
        pool.block(block)[:] = content[index * size : (index + 1) * size]
    engine.resume(request.request_id, TokenChunk(tuple(job["first"])), take)
    await ended
    return tokens


async def without_pool(engine: TorchEngine, job: dict[str, Any]) -> Any:
    return [engine.kv_pool is None, await alone(engine, job)]


async def compute_for_ever(engine: TorchEngine, job: dict[str, Any]) -> Any:
    """Compute until the world ends, having said that it does."""
    while True:
        await ask(engine, job["subjects"][0])
        print("computing", flush=True)  # noqa: T201 - the test waits for it


async def die(engine: TorchEngine, job: dict[str, Any]) -> Any:
    """Fail on rank 0 after a few steps, and return how the engine says so."""
    plan, num_plans = Scheduler.plan, 0

    def broken(scheduler: Scheduler) -> Step:
        nonlocal num_plans
        num_plans += 1
        if num_plans == 4:
            raise RuntimeError("a step failed")
        return plan(scheduler)

    setattr(Scheduler, "plan", broken)  # noqa: B010 - mypy would have it as a method
    request = request_of(prompt_of(0, 9), 50)
    last = [chunk async for chunk in generate(engine, request)][-1]
    return [last.error_code, str(await engine.died())]


def break_follower() -> None:
    """Make the next step of this rank fail."""

    def broken(_core: object) -> None:
        raise RuntimeError("this rank is broken")

    Core.forward = broken  # type: ignore[assignment]


JOBS: dict[str, Job] = {
    job.__name__: job
    for job in (
        alone,
        together,
        abort_storm,
        prefill,
        resume,
        without_pool,
        compute_for_ever,
        die,
    )
}


def options_of(job: dict[str, Any]) -> EngineOptions:
    return EngineOptions(Path(job["model"]), default_config("torch", KEYS, **job["settings"]))


async def lead(job: dict[str, Any]) -> Any:
    engine = TorchEngine(options_of(job))
    try:
        await engine.start()
        return await JOBS[job["job"]](engine, job)
    except LaunchError as error:
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        await engine.close()


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    try:
        rank = join(jobs[0]["settings"]["tensor_parallel_size"]).rank
    except LaunchError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    Path(f"{sys.argv[2]}.pid{rank}").write_text(str(os.getpid()))
    results = []
    place = shared_pages._place
    for job in jobs:
        shared_pages._place = (lambda: (str(rank),)) if job.get("far_apart") else place
        if rank:
            if job.get("break_follower"):
                break_follower()
            run_follower(options_of(job))
        else:
            results.append(asyncio.run(lead(job)))
    if not rank:
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

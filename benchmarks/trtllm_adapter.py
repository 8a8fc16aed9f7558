"""What the TensorRT-LLM adapter costs per token: CPU of the worker's event loop, on a stand-in for the engine.

The stand-in (``tests/fakes/trtllm``, ``FAKE_TRTLLM_ENGINE=free``) makes tokens up in a thread of its own and gives every
stream one per step, so what is measured is what reads them. In one run, three readers of the same streams:

* bare: ``async for`` over each result, and nothing else; nobody who uses this API can have less;
* adapter: the engine contract's chunks;
* worker: the chunks through a worker's outbox into frames for an ingress.

The figure is the loop thread's CPU time ÷ tokens; the medians of all rounds are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.demo import demo_model_path
from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.trtllm.engine import TrtllmEngine
from trtllm_workers.planes.frames import TokenBatch, encode
from trtllm_workers.types import GenerateRequest, SamplingParams, TokenChunk

STAND_IN = Path(__file__).resolve().parents[1] / "tests" / "fakes" / "trtllm"
PROMPT = list(range(10, 42))


class Outbox:
    """Gathers a step's chunks and encodes them, as a worker does for one ingress."""

    def __init__(self) -> None:
        self.batch = TokenBatch()
        self.scheduled = False
        self.num_bytes = 0

    def out(self, stream: int, done: Callable[[], None]) -> Callable[[TokenChunk], None]:
        """Return what one stream's chunks are given to."""
        started = False

        def deliver(chunk: TokenChunk) -> None:
            nonlocal started
            self.batch.add(stream, chunk, first=not started)
            started = True
            if not self.scheduled:
                self.scheduled = True
                asyncio.get_running_loop().call_soon(self._flush)
            if chunk.finish_reason is not None:
                done()

        return deliver

    def _flush(self) -> None:
        self.scheduled = False
        tokens = self.batch.take()
        if tokens is not None:
            self.num_bytes += len(encode(tokens))


async def measured(work: Callable[[], Awaitable[None]], num_tokens: int) -> float:
    """Return the loop thread's CPU time per token in microseconds."""
    began = time.thread_time()
    await work()
    return (time.thread_time() - began) / num_tokens * 1e6


async def bare(engine: TrtllmEngine, streams: int, tokens: int) -> None:
    """Read the results of TensorRT-LLM's own API and do nothing with them."""
    from tensorrt_llm.llmapi import SamplingParams as Theirs

    llm: Any = engine._llm

    async def read() -> None:
        sampling = Theirs(max_tokens=tokens, end_id=-1, pad_id=0, ignore_eos=True)
        async for _ in llm.generate_async(PROMPT, sampling, streaming=True):
            pass

    await asyncio.gather(*(read() for _ in range(streams)))


async def through(engine: TrtllmEngine, streams: int, tokens: int, *, frames: bool) -> None:
    """Read the same streams through the engine contract, with or without frames."""
    ended = asyncio.Event()
    left = streams
    outbox = Outbox()

    def done() -> None:
        nonlocal left
        left -= 1
        if not left:
            ended.set()

    def plain(chunk: TokenChunk) -> None:
        if chunk.finish_reason is not None:
            done()

    for number in range(streams):
        request = GenerateRequest(
            request_id=f"r{number}",
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
        )
        engine.submit(request, outbox.out(number, done) if frames else plain)
    await ended.wait()


async def run(streams: int, tokens: int, rounds: int) -> None:
    """Measure and print."""
    settings = {"enable_iter_perf_stats": False, "max_batch_size": 512, "max_seq_len": 2048}
    config = EngineConfig("trtllm", {key: Setting(one, "here") for key, one in settings.items()})
    engine = build_engine("trtllm", EngineOptions(demo_model_path(), config))
    assert isinstance(engine, TrtllmEngine)
    await engine.start()
    readers: dict[str, Callable[[], Awaitable[None]]] = {
        "bare": lambda: bare(engine, streams, tokens),
        "adapter": lambda: through(engine, streams, tokens, frames=False),
        "worker": lambda: through(engine, streams, tokens, frames=True),
    }
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, work in readers.items():
            found[name].append(await measured(work, streams * tokens))
    await engine.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"{streams} streams × {tokens} tokens, {rounds} rounds; CPU of the event loop per token")
    for name, values in found.items():
        print(
            f"  {name:8} {medians[name]:5.2f} µs  (from {min(values):.2f} to {max(values):.2f}), "
            f"{medians[name] / medians['bare']:.2f} × bare"
        )
    print(f"  the adapter itself: {medians['adapter'] - medians['bare']:.2f} µs")


def main() -> None:
    """Parse arguments and run, on uvloop as a worker does."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    os.environ |= {"FAKE_TRTLLM_ENGINE": "free", "FAKE_TRTLLM_NUM_GPUS": "1"}
    sys.path.insert(0, str(STAND_IN))
    uvloop.run(run(given.streams, given.tokens, given.rounds))


if __name__ == "__main__":
    main()

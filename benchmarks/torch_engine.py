"""Speed of the torch engine beside transformers' continuous batching and the memory's limit.

    .venv/bin/python benchmarks/torch_engine.py
    .venv/bin/python benchmarks/torch_engine.py --dtype bfloat16 --batch 1 --batch 32 --repeats 5
    .venv/bin/python benchmarks/torch_engine.py --threads 1      # steadier on a busy machine

A random-weight Llama of 124.7M parameters (hidden 768, 12 layers, 12 heads over 4 KV heads,
intermediate 2048, vocabulary 32,000) is written to a temporary folder. Each repeat measures memory
bandwidth, this engine and the peer one after the other, each in its own process, so that a busy
machine slows all three; the table shows medians over the repeats.

* decode: tokens per second between the moment the last stream has its first token and the end of
  the first stream; greedy, random prompts;
* prefill: prompt tokens over the time to the first token of one request, nothing cached;
* limit: read bandwidth over the bytes a step must read (all weights but the embedding, and the KV
  of every stream); "of limit" is the median of each repeat's own ratio.

Needs the dev group (transformers is the peer). Knows nothing of ingress and planes.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.fakes.tiny_models import make_tiny_checkpoint
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.registry import build_engine, engine_keys
from trtllm_workers.observe.logs import setup_logs
from trtllm_workers.types import GenerateRequest, SamplingParams, TokenChunk

VOCAB, HIDDEN, LAYERS, KV_HEADS, HEAD_DIM, INNER = 32_000, 768, 12, 4, 64, 2048
READ_PER_STEP = LAYERS * (HIDDEN * (HIDDEN * 2 + 2 * KV_HEADS * HEAD_DIM) + 3 * HIDDEN * INNER) + (
    VOCAB * HIDDEN
)
KV_VALUES_PER_TOKEN = LAYERS * 2 * KV_HEADS * HEAD_DIM
DEADLINE_S = 600.0
POOL_TOKENS, STEP_TOKENS = 65_536, 2048
_PEER_PAGE = 256
_BANDWIDTH_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """``streams`` requests of ``prompt_len`` tokens with ``output_len`` each; 1 is a prefill."""

    streams: int
    prompt_len: int
    output_len: int

    @property
    def name(self) -> str:
        if self.output_len == 1:
            return f"prefill {self.prompt_len}"
        return f"decode b={self.streams} at {self.prompt_len}"

    def prompts(self, chance: random.Random) -> list[list[int]]:
        return [chance.choices(range(3, VOCAB), k=self.prompt_len) for _ in range(self.streams)]


class Bandwidth:
    """Reads 1 GiB with all threads.

    By a matrix-vector product: of torch's operations it reads fastest (faster than sum or copy).
    """

    def __init__(self) -> None:
        self._matrix = torch.ones(4096, _BANDWIDTH_BYTES // 4 // 4096)
        self._vector = torch.ones(self._matrix.shape[1])

    def measure(self) -> float:
        """Return the best of three, in bytes per second."""
        times = []
        for _ in range(3):
            began = time.perf_counter()
            torch.mv(self._matrix, self._vector)
            times.append(time.perf_counter() - began)
        return _BANDWIDTH_BYTES / min(times)


class Apart:
    """An object in a process of its own, so that its threads and memory are not the engine's."""

    def __init__(self, make: Callable[..., Any], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            1, context, initializer=_make, initargs=(torch.get_num_threads(), make, args)
        )

    def measure(self, *args: object) -> float:
        return self._pool.submit(_measure, args).result(timeout=DEADLINE_S)

    def close(self) -> None:
        self._pool.shutdown()


_made: Any = None


def _make(num_threads: int, make: Callable[..., Any], args: tuple[object, ...]) -> None:
    global _made
    torch.set_num_threads(num_threads)
    _made = make(*args)


def _measure(args: tuple[object, ...]) -> float:
    return float(_made.measure(*args))


def rate(case: Case, began: float, stamps: Sequence[Sequence[float]]) -> float:
    """Return tokens per second from the times at which each stream's tokens came."""
    if case.output_len == 1:
        return case.streams * case.prompt_len / (max(s[0] for s in stamps) - began)
    first = max(s[0] for s in stamps)
    last = min(s[-1] for s in stamps)
    return sum(first < at <= last for s in stamps for at in s) / (last - first)


class Ours:
    """The torch engine, driven through its contract."""

    def __init__(self, folder: Path, dtype: str) -> None:
        config = default_config(
            "torch",
            engine_keys("torch"),
            dtype=dtype,
            max_num_tokens=STEP_TOKENS,
            kv_cache_config__max_tokens=POOL_TOKENS,
            kv_cache_config__enable_block_reuse=False,
        )
        extra = {"num_threads": str(torch.get_num_threads())}
        self._engine = build_engine("torch", EngineOptions(folder, config, extra=extra))

    async def start(self) -> None:
        await self._engine.start()

    async def measure(self, case: Case, prompts: Sequence[list[int]]) -> float:
        stamps: list[list[float]] = [[] for _ in prompts]
        done = asyncio.Event()
        num_open = len(prompts)

        def deliver(index: int, chunk: TokenChunk) -> None:
            nonlocal num_open
            stamps[index].extend([time.perf_counter()] * len(chunk.token_ids))
            if chunk.finish_reason is not None:
                num_open -= 1
                if not num_open:
                    done.set()

        sampling = SamplingParams(max_tokens=case.output_len, temperature=0.0, ignore_eos=True)
        began = time.perf_counter()
        for index, prompt in enumerate(prompts):
            request = GenerateRequest(
                request_id=str(index), prompt_token_ids=prompt, sampling=sampling
            )
            self._engine.submit(request, lambda chunk, index=index: deliver(index, chunk))  # type: ignore[misc]
        async with asyncio.timeout(DEADLINE_S):
            await done.wait()
        if any(len(stream) != case.output_len for stream in stamps):
            raise RuntimeError(f"the engine did not make {case.output_len} tokens for each prompt")
        return rate(case, began, stamps)

    async def close(self) -> None:
        await self._engine.close()


class Peer:
    """transformers' continuous batching, its own manager kept running between measurements."""

    def __init__(self, folder: Path, dtype: str) -> None:
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        # As many tokens of KV and per step as ours; left alone, it takes most of the host's memory.
        self._limits = transformers.ContinuousBatchingConfig(
            num_blocks=POOL_TOKENS // _PEER_PAGE,
            page_size=_PEER_PAGE,
            max_batch_tokens=STEP_TOKENS,
        )
        self._config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        self._model = model.eval()

    def measure(self, case: Case, prompts: Sequence[list[int]]) -> float:
        results = self._model.generate_batch(
            list(prompts),
            generation_config=self._config,
            continuous_batching_config=self._limits,
            max_new_tokens=case.output_len,
            record_timestamps=True,
            progress_bar=False,
        )
        found = list(results.values())
        if any(len(r.generated_tokens) != case.output_len for r in found):
            raise RuntimeError(f"the peer did not make {case.output_len} tokens for each prompt")
        # The stamp of arrival is the peer's own, so that starting its thread does not count.
        return rate(case, min(r.created_time for r in found), [r.timestamps for r in found])


def write_model(folder: Path, dtype: str) -> Path:
    """Write the 124.7M-parameter model."""
    return make_tiny_checkpoint(
        folder,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_heads=HIDDEN // HEAD_DIM,
        num_kv_heads=KV_HEADS,
        intermediate_size=INNER,
        max_position_embeddings=4096,
        dtype=dtype,
        eos_token_id=None,
    )


async def bench(args: argparse.Namespace, dtype: str) -> None:
    """Measure one dtype and print its table."""
    cases = [Case(b, args.prompt, args.output) for b in args.batch]
    cases += [Case(b, 1024, args.output) for b in args.long_batch]
    cases.append(Case(1, 1024, 1))
    chance = random.Random(0)
    bandwidth = Apart(Bandwidth)
    with tempfile.TemporaryDirectory() as name:
        # Elsewhere, too: once this process's own thread has used OpenMP, its idle helpers make the
        # engine's thread wait asleep after each operation, at half the speed.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
            folder = writer.submit(write_model, Path(name) / "llama-125m", dtype).result()
        ours = Ours(folder, dtype)
        await ours.start()
        peer = None if args.no_peer else Apart(Peer, folder, dtype)
        if peer:
            peer.measure(Case(1, 8, 2), [[5] * 8])  # loads the weights while the folder is there
    try:
        print(f"\n{dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        print(
            f"{'tokens/s':<18}{'ours':>9}{'limit':>9}{'of limit':>10}{'peer':>9}{'ours/peer':>11}"
        )
        for case in cases:
            await ours.measure(case, case.prompts(chance))  # warm up
            if peer:
                peer.measure(case, case.prompts(chance))
            rows: list[tuple[float, float, float]] = []
            for _ in range(args.repeats):
                limit = bandwidth.measure() / bytes_per_token(case, dtype)
                mine = await ours.measure(case, case.prompts(chance))
                theirs = peer.measure(case, case.prompts(chance)) if peer else float("nan")
                rows.append((mine, limit, theirs))
            print(line(case, rows), flush=True)
    finally:
        await ours.close()
        for process in (bandwidth, peer):
            if process:
                process.close()


def bytes_per_token(case: Case, dtype: str) -> float:
    """Return what one token of decoding must read: a step's weights shared by its streams, and KV."""
    size = getattr(torch, dtype).itemsize
    kv_tokens = case.prompt_len + case.output_len / 2
    return float(size * (READ_PER_STEP / case.streams + KV_VALUES_PER_TOKEN * kv_tokens))


def line(case: Case, rows: Sequence[tuple[float, float, float]]) -> str:
    """Return one line of the table: medians, and medians of ratios."""
    mine, limit, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
    against = statistics.median(m / t for m, _l, t in rows)
    text = f"{case.name:<18}{mine:>9.1f}"
    if case.output_len == 1:
        text += f"{'-':>9}{'-':>10}"
    else:
        share = statistics.median(m / bound for m, bound, _t in rows)
        text += f"{limit:>9.0f}{share:>9.0%} "
    return f"{text}{theirs:>9.1f}{against:>10.2f}×"


def main() -> None:
    """Read the command line and print one table per dtype."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", action="append", type=int, help="streams (1, 8 and 32)")
    parser.add_argument("--long-batch", action="append", type=int, help="streams at 1024 (1 and 8)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of decode cases")
    parser.add_argument("--output", type=int, default=64, help="output tokens of decode cases")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for all three"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    args = parser.parse_args()
    args.batch = args.batch or [1, 8, 32]
    args.long_batch = args.long_batch or [1, 8]
    setup_logs("benchmark", fmt="console", level="warning", path=None)
    torch.set_num_threads(args.threads)
    for dtype in args.dtype or ("bfloat16", "float32"):
        asyncio.run(bench(args, dtype))


if __name__ == "__main__":
    main()

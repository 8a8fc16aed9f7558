"""What routing by cached prefixes is worth: cache hit rate and time to the first token over four workers.

::

    .venv/bin/python -m benchmarks.routing                     # about 5 minutes
    .venv/bin/python -m benchmarks.routing --rounds 1 --modes kv round_robin

Real ingress and workers; the sim engine makes the tokens, at 100 µs of prefill a token, so that an uncached
prompt of a thousand tokens takes 0.1 s. Each worker's cache holds about a third of all chats. Every round
runs every mode on a fresh deployment, one after the other; tables show medians over the rounds.

* chats: many users in chats of several turns, each prompt being the whole chat so far, with one system
  prompt for all; a user sends the next turn when the answer has come, and a pause.
* strangers: prompts that share nothing, sent at the trace's times: mode kv must not be worse than
  least_loaded.

The hit rate is that of the engines, as usage tells it to the client, not the router's own belief.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.disaggregated import VOCAB, deployed, make_model
from benchmarks.traces import TraceRequest, chats, strangers

MODES = ("round_robin", "least_loaded", "kv")
COSTS = "prefill:\n  base_ms: 1\n  per_token_us: 100\ndecode:\n  base_ms: 4\n"
CACHED_TOKENS = 32_768  # of each worker


@dataclass(frozen=True)
class Told:
    """What one request was told."""

    ttft_s: float
    prompt_tokens: int
    cached_tokens: int


async def ask(client: httpx.AsyncClient, request: TraceRequest) -> Told:
    """Send one request and read its stream."""
    body = {
        "model": "demo",
        "prompt": list(request.prompt_token_ids),
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began_s, ttft_s, usage = time.perf_counter(), 0.0, None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event["choices"] and not ttft_s:
                ttft_s = time.perf_counter() - began_s
            usage = event.get("usage") or usage
    assert usage is not None, "the last event has the usage"
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Told(ttft_s, usage["prompt_tokens"], cached)


async def run(port: int, trace: Sequence[TraceRequest], *, paced: bool) -> list[Told]:
    """Run a trace: each chat's turns one after the other; ``paced``: at the trace's times instead."""
    limits = httpx.Limits(max_connections=None)
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, timeout=300, limits=limits) as client:
        began_s = time.perf_counter()

        async def at(second: float) -> None:
            await asyncio.sleep(max(0.0, began_s + second - time.perf_counter()))

        async def chat(turns: list[TraceRequest]) -> list[Told]:
            await at(turns[0].at_s)
            told = []
            for turn in turns:
                await asyncio.sleep(turn.pause_s)
                told.append(await ask(client, turn))
            return told

        async def alone(request: TraceRequest) -> list[Told]:
            await at(request.at_s)
            return [await ask(client, request)]

        if paced:
            found = await asyncio.gather(*map(alone, trace))
        else:
            by_chat = sorted(trace, key=lambda one: (one.chat, one.turn))
            groups = itertools.groupby(by_chat, key=lambda one: one.chat)
            found = await asyncio.gather(*(chat(list(turns)) for _, turns in groups))
    return [one for part in found for one in part]


def p90(values: Sequence[float]) -> float:
    """Return the 90th percentile."""
    return statistics.quantiles(values, n=10)[-1]


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=MODES)
    chosen = parser.parse_args()
    traces = {
        "chats": (
            chats(
                seed=1,
                num_chats=60,
                turns=8,
                system_tokens=128,
                chats_per_s=6,
                pause_s=1.5,
                vocab_size=VOCAB,
            ),
            False,
        ),
        "strangers": (strangers(seed=2, count=300, requests_per_s=20, vocab_size=VOCAB), True),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder)
        costs = folder / "costs.yaml"
        costs.write_text(COSTS)
        print("| trace | mode | hit rate | TTFT p50 | TTFT p90 |")
        print("| --- | --- | --- | --- | --- |")
        for trace_name, (trace, paced) in traces.items():
            told: dict[str, list[list[Told]]] = {mode: [] for mode in chosen.modes}
            for number in range(chosen.rounds):
                for mode in chosen.modes:
                    options = ["--engine", "sim", "--sim-cost-model", str(costs)]
                    options += ["--num-workers", "4", "--router-mode", mode]
                    options += ["--model-path", str(model)]
                    options += ["--set", f"kv_cache_config.max_tokens={CACHED_TOKENS}"]
                    with deployed("aggregated", folder / f"{mode}{number}", options) as one:
                        told[mode].append(asyncio.run(run(one.port, trace, paced=paced)))
            for mode, rounds in told.items():
                rates = [
                    sum(one.cached_tokens for one in each) / sum(one.prompt_tokens for one in each)
                    for each in rounds
                ]
                p50s = [statistics.median(one.ttft_s for one in each) for each in rounds]
                p90s = [p90([one.ttft_s for one in each]) for each in rounds]
                print(
                    f"| {trace_name} | {mode} | {statistics.median(rates):.3f} "
                    f"| {1e3 * statistics.median(p50s):.0f} ms "
                    f"| {1e3 * statistics.median(p90s):.0f} ms |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""What taking prefill and decode apart costs: time to the first token, and between tokens.

::

    .venv/bin/python -m benchmarks.disaggregated                      # all cells, about 5 minutes
    .venv/bin/python -m benchmarks.disaggregated ttft --rounds 15 --engine sim
    .venv/bin/python -m benchmarks.disaggregated itl --kv-transport tcp

Three deployments serve the same model side by side, two of them idle while one is measured:
aggregated, decode_first and prefill_first. Every round measures all three one after the other, so
that a busy machine slows all alike; tables show medians.

* ttft: one request at a time, fresh prompts of 1k and 4k tokens; from the request sent to the first
  content byte read. Transfer, queue and first decode come from the decode worker's own metrics:
  where computing the prompt takes long, its noise hides them in the difference.
* itl: equal numbers of streams that begin together; gap between tokens as the client sees it.

The torch engine serves a random-weight Llama of about 87M parameters in bf16;
the sim engine has fixed costs, so that its differences are what ingress, planes and handoff add. Needs
gcc for the load generator. Knows nothing of how the parts work.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import COMMAND, END_TIMEOUT_S, build_loadgen
from trtllm_workers.demo import demo_model_path

VOCAB = 1536
PROMPT_LENGTHS = (1024, 4096)
KINDS: dict[str, tuple[str, ...]] = {
    "aggregated": (),
    "decode_first": ("--disaggregated", "--strategy", "decode_first"),
    "prefill_first": ("--disaggregated", "--strategy", "prefill_first"),
}
SIM_COST = "prefill:\n  per_token_us: 50\ndecode:\n  base_ms: {step_ms}\n"


@dataclass(frozen=True)
class Deployment:
    """One running deployment."""

    kind: str
    port: int

    def metric_sum(self, name: str, label: str = "") -> float:
        """Return the sum of a metric over its series, those with ``label`` if given."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^trtllm_launch_{name}{{.*{label}.*}} (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))


def make_model(folder: Path) -> Path:
    """Write a random-weight checkpoint that the demo model's tokenizer serves."""
    from tests.fakes.tiny_models import make_tiny_checkpoint

    made = make_tiny_checkpoint(
        folder / "model",
        vocab_size=VOCAB,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=2048,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, made / name)
    return made


@contextlib.contextmanager
def deployed(
    kind: str, folder: Path, options: list[str], threads: int | None = None
) -> Iterator[Deployment]:
    """Serve until the block ends; each worker computes with ``threads``, by default all cores."""
    argv = [*COMMAND, "up", "--http-port", "0", "--run-dir", str(folder / kind)]
    argv += ["--log-level", "warning", "--served-model-name", "demo", *KINDS[kind], *options]
    # Each worker may use the whole machine: only one computes at a time.
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads or os.cpu_count() or 1)}
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    ) as up:
        assert up.stdout is not None
        try:
            seen = []
            for line in up.stdout:
                seen.append(line)
                if found := re.search(r"^ready after .*:(\d+)/v1", line):
                    break
            else:
                raise SystemExit(f"{kind} did not get ready:\n" + "".join(seen))
            yield Deployment(kind, int(found.group(1)))
        finally:
            up.send_signal(signal.SIGINT)
            up.stdout.close()
            up.wait(END_TIMEOUT_S)


@contextlib.contextmanager
def all_deployed(
    folder: Path, options: list[str], transport: str, threads: int | None
) -> Iterator[list[Deployment]]:
    """Serve all three kinds side by side."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                deployed(
                    kind,
                    folder,
                    [*options, *(("--kv-transport", transport) if flags else ())],
                    threads,
                )
            )
            for kind, flags in KINDS.items()
        ]


def first_token_s(deployment: Deployment, prompt: list[int]) -> float:
    """Return the seconds from the request sent to the first content byte."""
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", deployment.port, timeout=120)
    try:
        began = time.perf_counter()
        connection.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        while line := answer.readline():
            if b'"text":' in line:
                took_s = time.perf_counter() - began
                answer.read()
                return took_s
        raise SystemExit(f"{deployment.kind}: HTTP {answer.status} without a token")
    finally:
        connection.close()


def ttft(deployments: list[Deployment], rounds: int) -> None:
    """Print the times to the first token."""
    dice = random.Random(3)
    print("| prompt | kind | TTFT | over aggregated | transfer | left | queue, first decode |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for length in PROMPT_LENGTHS:
        times: dict[str, list[float]] = {one.kind: [] for one in deployments}
        transfers: dict[str, list[float]] = {one.kind: [] for one in deployments}
        beside: dict[str, list[float]] = {one.kind: [] for one in deployments}
        for number in range(rounds + 1):
            for one in deployments:
                prompt = dice.choices(range(5, VOCAB), k=length)
                took_s = first_token_s(one, prompt)
                if number == 0:
                    continue  # first touches of pages and code
                times[one.kind].append(took_s)
            # Workers tell their metrics once a second.
            time.sleep(1.1)
            for one in deployments:
                transfers[one.kind].append(one.metric_sum("kv_transfer_seconds_total"))
                beside[one.kind].append(
                    one.metric_sum("first_token_phase_seconds_sum", 'phase="queue"')
                    + one.metric_sum("first_token_phase_seconds_sum", 'phase="first_decode"')
                )
        for kind, taken in times.items():
            over = statistics.median(
                [mine - other for mine, other in zip(taken, times["aggregated"], strict=True)]
            )
            moved, waited = (
                statistics.median([b - a for a, b in itertools.pairwise(told[kind])])
                for told in (transfers, beside)
            )
            cells = [f"{statistics.median(taken) * 1e3:.1f} ms", f"{over * 1e3:+.1f} ms"]
            cells += [f"{moved * 1e3:.1f} ms", f"{(over - moved) * 1e3:+.1f} ms"]
            cells.append(f"{waited * 1e3:.1f} ms")
            print(f"| {length} | {kind} | {' | '.join(cells)} |", flush=True)


def itl(deployments: list[Deployment], rounds: int, folder: Path, streams: int) -> None:
    """Print the gaps between tokens."""
    loadgen = build_loadgen(folder)
    bodies = folder / "bodies.jsonl"
    with bodies.open("w") as out:
        for number in range(500):
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": f"[{number}] tell me"}],
                "max_tokens": 200,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            out.write(json.dumps(body) + "\n")
    gaps: dict[str, list[float]] = {one.kind: [] for one in deployments}
    for _ in range(rounds):
        for one in deployments:
            # One wave: all streams begin together, so that no prefill disturbs decode meanwhile.
            argv = [str(loadgen), "-p", str(one.port), "-b", str(bodies), "-c", str(streams)]
            argv += ["-w", "0", "-n", str(streams)]
            done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
            measured: dict[str, Any] = json.loads(done.stdout)
            if measured["errors"]:
                raise SystemExit(f"{one.kind}: {measured}")
            gaps[one.kind].append(measured["itl_ms"]["p50"])
    base = statistics.median(gaps["aggregated"])
    print("| kind | gap between tokens, p50 | of aggregated |")
    print("| --- | --- | --- |")
    for kind, values in gaps.items():
        middle = statistics.median(values)
        print(f"| {kind}, {streams} streams | {middle:.2f} ms | {middle / base:.3f} |", flush=True)


def main() -> None:
    """Parse the arguments and run the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", choices=["ttft", "itl", []], default=[])
    parser.add_argument("--engine", choices=["torch", "sim"], action="append")
    parser.add_argument("--kv-transport", default="ucx")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of a worker; one is steadier")
    parser.add_argument("--streams", type=int, default=8)
    args = parser.parse_args()
    cells = args.cells or ["ttft", "itl"]
    for engine in args.engine or ["sim", "torch"]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options = ["--engine", engine, "--model-path", str(make_model(folder))]
            if engine == "sim":
                cost = folder / "cost.yaml"
                cost.write_text(SIM_COST.format(step_ms=10))
                options += ["--sim-cost-model", str(cost)]
            # Several of the long prompts, and not all memory of the machine.
            options += ["--set", "kv_cache_config.max_tokens=32768"]
            print(f"\n{engine}, transport {args.kv_transport}, {args.rounds} rounds, medians")
            with all_deployed(folder, options, args.kv_transport, args.threads) as deployments:
                if "ttft" in cells:
                    ttft(deployments, args.rounds)
                if "itl" in cells:
                    itl(deployments, args.rounds, folder, args.streams)
    sys.stdout.flush()


if __name__ == "__main__":
    main()

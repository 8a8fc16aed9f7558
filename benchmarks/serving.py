"""CPU per token, TTFT and throughput of ingress and worker over HTTP, on the sim engine.

::

    .venv/bin/python benchmarks/serving.py                  # all cells, 5 rounds, about 5 minutes
    .venv/bin/python benchmarks/serving.py paced --rounds 3
    .venv/bin/python benchmarks/serving.py start            # start-up times

Cells: ``paced`` = 128 streams at a 10 ms engine step; ``single`` = one stream on an engine that costs
nothing, so that TTFT is what ingress and planes add; ``free`` = 128 streams on that engine. Prompts
have about 200 tokens and differ; answers have 128. The client is loadgen.c (needs gcc), which counts
SSE events and reads the processes' CPU time from /proc. Knows nothing of how the parts work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COSTS = ROOT / "engine_configs" / "sim"
COMMAND = [sys.executable, "-m", "trtllm_workers.cli.main"]
ISL, OSL = 200, 128
END_TIMEOUT_S = 30

# cell: (cost model, concurrency, seconds)
CELLS = {"paced": ("10ms", 128, 8.0), "single": ("free", 1, 4.0), "free": ("free", 128, 6.0)}


def build_loadgen(folder: Path) -> Path:
    """Compile the load generator and return its path."""
    target = folder / "loadgen"
    source = ROOT / "benchmarks" / "loadgen.c"
    subprocess.run(["gcc", "-O2", "-o", str(target), str(source), "-lm"], check=True)
    return target


def write_bodies(path: Path, count: int = 4000) -> None:
    """Write request bodies of about ISL tokens each, no two alike."""
    from tokenizers import Tokenizer

    from trtllm_workers.demo import demo_model_path

    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    words = re.findall(r"\w+", (ROOT / "trtllm_workers" / "demo" / "faq.md").read_text())
    rnd = random.Random(1)
    per_word = len(tokenizer.encode(" ".join(words[:2000])).ids) / 2000
    with path.open("w") as out:
        for index in range(count):
            text = " ".join(rnd.choices(words, k=round((ISL - 12) / per_word)))
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": f"[{index}] {text}"}],
                "max_tokens": OSL,
                "temperature": 0,
                "ignore_eos": True,
                "stop": ["\x00never"],  # stop strings cost something; they are searched, not found
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            out.write(json.dumps(body) + "\n")


@contextlib.contextmanager
def running(cost: str, folder: Path) -> Iterator[tuple[int, dict[str, int]]]:
    """Serve on the sim engine; yield the HTTP port and the pids by process name."""
    run_dir = folder / "runs"
    argv = [*COMMAND, "up", "--engine", "sim", "--sim-cost-model", str(COSTS / f"{cost}.yaml")]
    argv += ["--http-port", "0", "--run-dir", str(run_dir), "--log-level", "warning"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        assert up.stdout is not None
        try:
            seen = []
            for line in up.stdout:
                seen.append(line)
                if found := re.search(r"^ready after .*:(\d+)/v1", line):
                    break
            else:
                raise SystemExit("the launcher did not get ready:\n" + "".join(seen))
            listed = subprocess.run(
                [*COMMAND, "ps", "--run-dir", str(run_dir)],
                capture_output=True,
                text=True,
                check=True,
            )
            rows = re.findall(r"^\S+\s+(worker-0|ingress)\s+(\d+)", listed.stdout, re.MULTILINE)
            yield int(found.group(1)), {name: int(pid) for name, pid in rows}
        finally:
            up.send_signal(signal.SIGINT)
            up.stdout.close()
            up.wait(END_TIMEOUT_S)


def load(loadgen: Path, bodies: Path, port: int, pids: dict[str, int], cell: str) -> dict[str, Any]:
    """Run one cell once and return what the load generator measured."""
    _, concurrency, seconds = CELLS[cell]
    argv = [str(loadgen), "-p", str(port), "-b", str(bodies), "-c", str(concurrency)]
    argv += ["-w", str(2 * concurrency), "-d", str(seconds)]
    for name, pid in pids.items():
        argv += ["-P", f"{name}={pid}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
    measured: dict[str, Any] = json.loads(done.stdout)
    if measured["errors"] or measured["no_usage"]:
        raise SystemExit(f"{cell}: the load had errors: {measured}")
    return measured


def report(cell: str, runs: list[dict[str, Any]]) -> None:
    """Print the medians of one cell."""

    def median(read: Any) -> float:
        return float(statistics.median(read(run) for run in runs))

    tokens = median(lambda r: r["out_tok_s"])
    events = median(lambda r: r["content_events"] / r["out_tokens"])
    print(f"{cell}: {len(runs)} rounds, medians; {CELLS[cell][1]} streams, OSL {OSL}")
    print(f"  requests/s {median(lambda r: r['req_s']):.1f}   tokens/s {tokens:.0f}   ", end="")
    print(f"events/token {events:.3f}")
    print(f"  TTFT p50 {median(lambda r: r['ttft_ms']['p50']):.2f} ms   ", end="")
    print(f"p99 {median(lambda r: r['ttft_ms']['p99']):.2f} ms   ", end="")
    print(f"gap p50 {median(lambda r: r['itl_ms']['p50']):.2f} ms  ", end="")
    print(f"p99 {median(lambda r: r['itl_ms']['p99']):.2f} ms")
    both = 0.0
    for name in ("ingress", "worker-0"):
        cost = median(lambda r, n=name: r["procs"][n]["cpu_s_per_1k_tok"] * 1000)
        lowest = min(r["procs"][name]["cpu_s_per_1k_tok"] * 1000 for r in runs)
        highest = max(r["procs"][name]["cpu_s_per_1k_tok"] * 1000 for r in runs)
        rss = median(lambda r, n=name: r["procs"][n]["rss_mb"])
        both += cost
        print(f"  {name:9} {cost:5.2f} µs CPU/token ({lowest:.2f}-{highest:.2f})  RSS {rss:.0f} MB")
    print(f"  together  {both:5.2f} µs CPU/token", flush=True)


def first_token_after(argv: list[str], environ: dict[str, str], port: int) -> float:
    """Return the seconds from the command to the first token of a streamed chat answer."""
    began = time.monotonic()
    body = json.dumps(
        {
            "model": "demo",
            "messages": [{"role": "user", "content": "What is prefill?"}],
            "stream": True,
            "max_tokens": 4,
        }
    ).encode()
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    with subprocess.Popen(
        argv,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as up:
        try:
            while time.monotonic() < began + 60:
                with contextlib.suppress(OSError):
                    request = urllib.request.Request(url, body, headers)
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        for line in answer:
                            if b'"content":"' in line and b'"content":""' not in line:
                                return time.monotonic() - began
                time.sleep(0.02)
            raise SystemExit("no token within 60 s")
        finally:
            os.killpg(up.pid, signal.SIGINT)  # to the group, as a terminal does on Ctrl-C
            up.wait(END_TIMEOUT_S)


def start_times(rounds: int, folder: Path) -> None:
    """Print how long ``make serve`` takes to the first token, and ``--help``."""
    environ = {**os.environ, "RUN_DIR": str(folder / "runs"), "HTTP_PORT": "18473"}
    argv = ["make", "-s", "-C", str(ROOT), "serve"]
    serve = [first_token_after(argv, environ, 18473) for _ in range(rounds)]
    helps = []
    for _ in range(rounds):
        began = time.monotonic()
        subprocess.run([str(ROOT / ".venv/bin/trtllm-launch"), "--help"], capture_output=True)
        helps.append(time.monotonic() - began)
    print(f"make serve to first token: median {statistics.median(serve):.2f} s of {rounds}")
    print(f"trtllm-launch --help:      median {statistics.median(helps):.2f} s of {rounds}")


def main() -> None:
    """Parse the arguments and run the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", default=[*CELLS, "start"], help="which cells to run")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loadgen, bodies = build_loadgen(folder), folder / "bodies.jsonl"
        write_bodies(bodies)
        for cell in args.cells:
            if cell == "start":
                start_times(args.rounds, folder)
                continue
            with running(CELLS[cell][0], folder) as (port, pids):
                report(cell, [load(loadgen, bodies, port, pids, cell) for _ in range(args.rounds)])


if __name__ == "__main__":
    main()

"""The prefill queue: what it adds to a first token, and what deaths of prefill workers cost.

::

    .venv/bin/python -m benchmarks.prefill_queue                        # both, about 5 minutes
    .venv/bin/python -m benchmarks.prefill_queue latency --requests 300
    .venv/bin/python -m benchmarks.prefill_queue deaths --requests 2000 --kill-every-s 2

* latency: two deployments of the sim engine side by side, one with direct dispatch, one with a queue.
  One request at a time goes to each in turn, with a fresh prompt; the difference of each two is what the
  queue adds to the time to the first token.
* deaths: many requests at a time, while prefill workers are killed at random moments (the launcher
  starts them again). An answer that does not come, or differs from the one that its prompt gave before,
  is lost; tokens beyond those that were asked for are doubled.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.disaggregated import VOCAB, Deployment, deployed, first_token_s
from trtllm_workers.demo import demo_model_path
from trtllm_workers.deploy.run import RunRecord

QUEUE = ("--prefill-dispatch", "queue")
NUM_TOKENS = 16
NUM_PROMPTS = 50


def sim_options(folder: Path, cost: str) -> list[str]:
    """Return the options of a deployment of the sim engine."""
    path = folder / "cost.yaml"
    path.write_text(cost)
    return [
        *("--engine", "sim", "--model-path", str(demo_model_path())),
        *("--sim-cost-model", str(path), "--kv-transport", "tcp"),
    ]


def latency(folder: Path, num_requests: int) -> None:
    """Print the time to the first token with and without the queue."""
    options = sim_options(folder, "prefill:\n  per_token_us: 5\ndecode:\n  base_ms: 1\n")
    dice = random.Random(1)
    print("| prompt | direct, p50 | queue, p50 | added, p50 | added, p90 |")
    print("| --- | --- | --- | --- | --- |")
    with (
        deployed("decode_first", folder / "direct", options) as direct,
        deployed("decode_first", folder / "queue", [*options, *QUEUE]) as queued,
    ):
        for length in (128, 1024):
            times: dict[str, list[float]] = {"direct": [], "queue": []}
            for number in range(num_requests + 20):
                prompt = dice.choices(range(5, VOCAB), k=length)
                for name, one in (("direct", direct), ("queue", queued)):
                    took_s = first_token_s(one, prompt)
                    if number >= 20:  # the first touch pages and code
                        times[name].append(took_s * 1e3)
            added = [b - a for a, b in zip(times["direct"], times["queue"], strict=True)]
            cells = [statistics.median(times["direct"]), statistics.median(times["queue"])]
            cells += [statistics.median(added), statistics.quantiles(added, n=10)[-1]]
            print(f"| {length} | {' | '.join(f'{cell:.2f} ms' for cell in cells)} |", flush=True)
        fallbacks = queued.metric_sum("prefill_fallbacks_total")
        if fallbacks:
            raise SystemExit(f"{fallbacks:g} prompts did not go through the queue")


class Killer:
    """Kills a prefill worker of a run again and again, at random moments."""

    def __init__(self, run_dir: Path, every_s: float) -> None:
        self._run_dir = run_dir
        self._every_s = every_s
        self._dice = random.Random(2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.num_killed = 0

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._dice.uniform(0.5, 1.5) * self._every_s):
            for path in self._run_dir.glob("*/run.json"):
                record = msgspec.json.decode(path.read_bytes(), type=RunRecord)
                pids = [one.pid for one in record.processes if one.role == "prefill"]
                try:
                    os.kill(self._dice.choice(pids), signal.SIGKILL)
                except (ProcessLookupError, IndexError):
                    continue  # it is being started again
                self.num_killed += 1


class Client(threading.local):
    """One connection per thread."""

    connection: http.client.HTTPConnection | None = None

    def text(self, port: int, prompt: list[int], salt: str) -> tuple[str, int]:
        """Return an answer's text and its number of tokens. Raises OSError or ValueError."""
        body: dict[str, Any] = {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": salt,
        }
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status}: {text[:200]!r}")
        told = json.loads(text)
        return told["choices"][0]["text"], told["usage"]["completion_tokens"]


def deaths(folder: Path, num_requests: int, streams: int, kill_every_s: float) -> None:
    """Print what became of requests while prefill workers died."""
    options = sim_options(folder, "prefill:\n  per_token_us: 20\ndecode:\n  base_ms: 2\n")
    options += [
        *QUEUE,
        "--num-prefill-workers",
        "2",
        "--max-restarts",
        "1000",
    ]
    dice = random.Random(3)
    prompts = [dice.choices(range(5, VOCAB), k=dice.randrange(32, 600)) for _ in range(NUM_PROMPTS)]
    client = Client()
    with deployed("decode_first", folder / "deaths", options) as one:
        expected = [client.text(one.port, prompt, "first") for prompt in prompts]
        before = one.metric_sum("output_tokens_total")

        def ask(number: int) -> str:
            which = number % NUM_PROMPTS
            try:
                found = client.text(one.port, prompts[which], str(number))
            except (OSError, ValueError, http.client.HTTPException) as error:
                client.connection = None
                return f"lost: {error!r}"
            if found[1] > NUM_TOKENS:
                return "doubled"
            return (
                "right"
                if found == expected[which]
                else f"lost: {found[0]!r} for {expected[which][0]!r}"
            )

        began = time.monotonic()
        with (
            Killer(folder / "deaths" / "decode_first", kill_every_s) as killer,
            ThreadPoolExecutor(streams) as pool,
        ):
            outcomes = list(pool.map(ask, range(num_requests)))
        took_s = time.monotonic() - began
        report(one, outcomes, took_s, killer.num_killed, before)


def report(
    one: Deployment, outcomes: list[str], took_s: float, num_killed: int, before: float
) -> None:
    """Print the counts; what the workers tell comes once a second."""
    time.sleep(2.5)
    lost = [text for text in outcomes if text.startswith("lost")]
    beyond = one.metric_sum("output_tokens_total") - before - len(outcomes) * NUM_TOKENS
    jobs = {
        outcome: int(one.metric_sum("prefill_queue_jobs_total", f'outcome="{outcome}"'))
        for outcome in ("filled", "lost", "given_back")
    }
    jobs["computed by decode"] = int(one.metric_sum("prefill_fallbacks_total"))
    print("| requests | killed | lost | doubled | tokens too many | jobs | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    told = ", ".join(f"{count} {name}" for name, count in jobs.items() if count)
    print(
        f"| {len(outcomes):,} | {num_killed} | {len(lost)} | {outcomes.count('doubled')} "
        f"| {beyond:g} | {told} | {took_s:.0f} |",
        flush=True,
    )
    for text in lost[:5]:
        print(text)
    held = one.metric_sum("blocks_allocated_total") - one.metric_sum("blocks_freed_total")
    leaked = one.metric_sum("leaked_blocks_total")
    print(f"blocks held afterwards: {held:g}, leaked: {leaked:g}")


def main() -> None:
    """Parse the arguments and run the cells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", choices=["latency", "deaths", []], default=[])
    parser.add_argument("--requests", type=int, help="latency: 200 per length; deaths: 10000")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--kill-every-s", type=float, default=4.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if not args.cells or "latency" in args.cells:
            latency(Path(name), args.requests or 200)
        if not args.cells or "deaths" in args.cells:
            deaths(Path(name), args.requests or 10_000, args.streams, args.kill_every_s)


if __name__ == "__main__":
    main()

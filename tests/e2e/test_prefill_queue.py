"""The prefill queue in real processes: tokens, a NATS server of the run's own, deaths under load."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import stat
import threading
from pathlib import Path

import pytest

from tests.e2e.harness import DEMO, Process, Workbench
from tests.e2e.parts import Parts, completion, costs, text_of
from tests.fakes.nats_server import nats_server

QUEUE = ("--prefill-dispatch", "queue")
PROMPTS = [
    "What is prefill?",
    "Tell me about KV blocks. " * 12,
    "Tell me about KV blocks. " * 12 + "And then?",
    "A long prompt that needs more than one step. " * 60,
]


@pytest.mark.parametrize("transport", ["ucx", "nixl", "tcp"])
def test_answers_equal_an_aggregated_runs(bench: Workbench, served: str, transport: str) -> None:
    run, url = bench.up(
        *("--disaggregated", *QUEUE, "--num-prefill-workers", "2"),
        *("--kv-transport", transport, "--set", "max_num_tokens=256"),
    )
    bodies = [completion(prompt) for prompt in PROMPTS]
    expected = [text_of(served, body) for body in bodies]
    for _round in range(2):
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            assert list(pool.map(lambda body: text_of(url, body), bodies)) == expected
    parts = Parts(bench)
    parts.url = url
    filled = 2 * len(bodies) + 1  # and the launcher's probe
    parts.wait(lambda: parts.metric("prefill_queue_jobs_total", outcome="filled") == filled, "told")
    assert parts.metric("prefill_fallbacks_total") == 0
    assert parts.metric("prefill_queue_seconds_count") == filled
    parts.wait(lambda: parts.metric("prefill_queue_requests") == 0, "acknowledged")
    parts.wait_no_block_held()
    run.signal(signal.SIGINT)
    assert run.wait_end() == 130
    bench.wait_empty()
    left = [path.name for path in bench.run_dir.iterdir()]
    assert left == ["history"], "a run leaves its history alone"


def nats_folder(bench: Workbench) -> Path:
    (folder,) = bench.run_dir.glob("*/nats")
    return folder


def test_the_runs_own_nats_server_is_closed_to_others_and_ends_last(bench: Workbench) -> None:
    run, _ = bench.up("--disaggregated", *QUEUE, "--engine", "sim", "--kv-transport", "tcp")
    config = nats_folder(bench) / "nats.conf"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    listed = bench.run("ps").output
    found = re.search(r"nats\s+\d+\s+nats\s+listening\s+nats://127\.0\.0\.1:(\d+)", listed)
    assert found, listed
    token = re.search(r'token: "(\w+)"', config.read_text())
    assert token
    everything = b"".join(
        (Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in bench.survivors()
    )
    assert token.group(1).encode() not in everything
    run.signal(signal.SIGTERM)
    assert run.wait_end() == 0
    bench.wait_empty()


def test_the_death_of_the_nats_server_ends_the_run_with_its_name(bench: Workbench) -> None:
    run, _ = bench.up("--disaggregated", *QUEUE, "--engine", "sim", "--kv-transport", "tcp")
    server = next(pid for pid, words in bench.survivors().items() if "nats.conf" in words)
    os.kill(server, signal.SIGKILL)
    assert run.wait_end() == 4
    assert re.search(r"^trtllm-launch: nats ", run.output, re.MULTILINE), run.output
    assert "ended by itself" in run.output
    bench.wait_empty()


def test_the_death_of_its_owner_ends_the_nats_server(bench: Workbench) -> None:
    run, _ = bench.up("--disaggregated", *QUEUE, "--engine", "sim", "--kv-transport", "tcp")
    os.kill(bench.pid_of("nats"), signal.SIGKILL)
    assert run.wait_end() == 4
    bench.wait_empty()


class Deployment:
    """An ingress, a decode worker and prefill workers of the sim engine around one NATS server."""

    def __init__(self, bench: Workbench, nats_url: str, *options: str, cost: str) -> None:
        self.parts = Parts(
            bench,
            *("--engine", "sim", "--sim-cost-model", cost, "--kv-transport", "tcp"),
            *(*QUEUE, "--nats-server", nats_url, *options),
        )
        self.parts.ingress()
        self.parts.worker("decode", "d0")

    def ready(self, *prefills: str) -> None:
        for name in prefills:
            self.parts.worker("prefill", name)
        self.parts.wait_ready()
        self.parts.wait_pairs(len(prefills))


def test_prefill_workers_killed_under_load_lose_and_double_nothing(
    bench: Workbench, tmp_path: Path
) -> None:
    """Each answer is compared with the one that the same prompt gave before any death."""
    cost = costs(tmp_path / "cost.yaml", prefill_ms_per_token=0.1, decode_ms=1)
    with nats_server(tmp_path / "nats") as server:
        deployment = Deployment(bench, server.url, cost=cost)
        parts = deployment.parts
        deployment.ready("p0", "p1")
        bodies = [
            completion([5 + (n * 31 + i) % 400 for i in range(120)], max_tokens=20, ignore_eos=True)
            for n in range(10)
        ]
        expected = [text_of(parts.url, body) for body in bodies]
        alive, number = ["p0", "p1"], 2
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            jobs = []
            for turn in range(48):
                jobs += [
                    (
                        which,
                        pool.submit(text_of, parts.url, {**body, "cache_salt": f"{turn}-{which}"}),
                    )
                    for which, body in enumerate(bodies)
                ]
                threading.Event().wait(0.15)
                if turn % 3 == 2:
                    victim = alive.pop(0)
                    os.kill(parts.pid(victim), signal.SIGKILL)
                    parts.workers[victim].popen.wait(10)
                    alive.append(f"p{number}")
                    parts.worker("prefill", alive[-1])
                    number += 1
                    parts.wait_pairs(2)
                    # On a busy machine a killed worker may have had nothing to do; then others follow it.
                    lost = parts.metric("prefill_queue_jobs_total", outcome="lost")
                    if turn >= 11 and lost >= 1:
                        break
            for which, job in jobs:
                assert job.result() == expected[which]
        assert parts.metric("prefill_queue_jobs_total", outcome="filled") > 60
        assert parts.metric("prefill_queue_jobs_total", outcome="lost") >= 1, "kills must meet jobs"
        parts.wait_no_block_held()


def test_nats_away_for_a_while_costs_time_and_no_answer(bench: Workbench, tmp_path: Path) -> None:
    cost = costs(tmp_path / "cost.yaml", prefill_ms_per_token=0.1)
    with nats_server(tmp_path / "nats") as server:
        deployment = Deployment(bench, server.url, cost=cost)
        parts = deployment.parts
        deployment.ready("p0")
        body = completion([5 + i % 400 for i in range(120)])
        expected = text_of(parts.url, body)
        server.stop()
        for turn in range(3):
            assert text_of(parts.url, {**body, "cache_salt": f"away-{turn}"}) == expected
        parts.wait(
            lambda: parts.metric("prefill_fallbacks_total", cause="queue_away") == 3, "counted"
        )
        server.start()
        number = iter(range(1000))

        def queued() -> bool:
            salted = {**body, "cache_salt": f"back-{next(number)}"}
            assert text_of(parts.url, salted) == expected
            return parts.metric("prefill_queue_jobs_total", outcome="filled") >= 2

        parts.wait(queued, "queueing again")
        parts.wait_no_block_held()


def test_a_wrong_address_or_token_is_told_at_once(bench: Workbench, tmp_path: Path) -> None:
    discovery = (tmp_path / "discovery").as_uri()
    with nats_server(tmp_path / "nats", "--auth", "right") as server:
        worker = (
            *("worker", "--role", "decode", "--engine", "sim", "--discovery", discovery),
            *(*QUEUE, "--kv-transport", "tcp"),
        )
        refused = bench.run(*worker, "--nats-server", server.url, NATS_TOKEN="wrong")
        assert refused.popen.returncode == 2
        assert "does not let us in" in refused.output
        assert "NATS_TOKEN" in refused.output
        nowhere = bench.run(*worker)
        assert nowhere.popen.returncode == 2
        assert "--nats-server nats://host:4222" in nowhere.output
    both = bench.run("plan", "--disaggregated", *QUEUE, "--strategy", "prefill_first")
    assert both.popen.returncode == 2
    assert "queue needs --strategy decode_first" in both.output


def test_the_printed_plan_names_the_server_and_its_workers(bench: Workbench) -> None:
    printed: Process = bench.run(
        "up", "--dry-run", "--disaggregated", *QUEUE, "--engine", "sim", "--model-path", str(DEMO)
    )
    assert printed.popen.returncode == 0, printed.output
    assert re.search(r"trtllm_workers\.cli\.main nats \\\n\s+--folder \S+/nats", printed.output)
    assert printed.output.index("# nats") < printed.output.index("# prefill-0")
    assert printed.output.count("--nats-status-file") == 2
    assert printed.output.count("--prefill-dispatch queue") == 2

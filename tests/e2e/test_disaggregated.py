"""Prefill and decode in real processes: strategies, transports, deaths, stand-stills, bad input."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.harness import Workbench
from tests.e2e.parts import Parts, completion, costs, text_of

STRATEGIES = ["decode_first", "prefill_first"]
PROMPTS = [
    "What is prefill?",
    "Tell me about KV blocks. " * 12,  # several blocks
    "Tell me about KV blocks. " * 12 + "And then?",  # most of it cached by then
    "A long prompt that needs more than one step. " * 60,
]


@pytest.mark.parametrize("transport", ["ucx", "nixl", "tcp"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_equal_an_aggregated_runs(
    bench: Workbench, served: str, strategy: str, transport: str
) -> None:
    """The demo model, chunked prefill, prefix hits, and all prompts at once for batch mates."""
    _, url = bench.up(
        *("--disaggregated", "--strategy", strategy, "--kv-transport", transport),
        *("--set", "max_num_tokens=256"),
    )
    bodies = [completion(prompt) for prompt in PROMPTS]
    expected = [text_of(served, body) for body in bodies]
    for _round in range(2):
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            assert list(pool.map(lambda body: text_of(url, body), bodies)) == expected
    parts = Parts(bench)
    parts.url = url
    transfers = 2 * len(bodies) + 1  # the gate's probe
    parts.wait(lambda: parts.metric("kv_transfers_total", transport=transport) == transfers, "told")
    assert parts.metric("prefill_fallbacks_total") == 0
    moved = re.search(r'kv_transfers_total{.*wire="(\S+?)"', parts.get("/metrics").text)
    assert moved
    listed = bench.run("ps")
    assert re.search(rf"decode-0\s+prefill-0\s+{transport}\s+{moved.group(1)}\s", listed.output), (
        listed.output
    )


def test_with_two_ranks_answers_equal_an_aggregated_runs_with_two_ranks(bench: Workbench) -> None:
    """Each worker is one MPI world; blocks of both ranks move in one piece."""
    two = ("--set", "tensor_parallel_size=2", "--set", "max_num_tokens=256")
    bodies = [completion(prompt) for prompt in PROMPTS]
    run, url = bench.up(*two)
    expected = [text_of(url, body) for body in bodies]
    run.signal(signal.SIGINT)
    run.wait_end()
    for strategy in STRATEGIES:
        run, url = bench.up("--disaggregated", "--strategy", strategy, *two)
        for _round in range(2):
            with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
                assert list(pool.map(partial(text_of, url), bodies)) == expected
        run.signal(signal.SIGINT)
        run.wait_end()
    bench.wait_empty()


def test_a_dead_rank_ends_its_worker_and_is_named(bench: Workbench) -> None:
    run, _ = bench.up("--disaggregated", "--set", "tensor_parallel_size=2", "--max-restarts", "0")
    ranks = [
        pid
        for pid, command in bench.survivors().items()
        if "decode-0" in command and "mpiexec" not in command and "mpi4py" in command
    ]
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(max(ranks), signal.SIGKILL)
    assert run.wait_end() == 4
    assert time.monotonic() - began < 10
    assert re.search(r"rank \d of decode-0 was killed by SIGKILL", run.output), run.output
    bench.wait_empty()
    assert not list(Path("/dev/shm").glob("mpich_shm_*")), "MPI's memory has no name that stays"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_prefill_worker_killed_at_any_moment_changes_no_text(
    bench: Workbench, tmp_path: Path, strategy: str
) -> None:
    """Before, during and after its part: prefill takes 0.3 s here, the whole answer 0.8 s."""
    cost = costs(tmp_path / "cost.yaml", prefill_ms_per_token=1.0, decode_ms=5)
    parts = Parts(bench, "--engine", "sim", "--sim-cost-model", cost, "--kv-transport", "tcp")
    parts.ingress("--strategy", strategy)
    parts.worker("decode", "d0")
    parts.worker("prefill", "p0")
    parts.wait_ready()
    body = completion([5 + i % 400 for i in range(300)], max_tokens=100)
    expected = text_of(parts.url, body)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for number, delay_s in enumerate((0.0, 0.1, 0.28, 0.3, 0.32, 0.5)):
            name = f"p{number}"
            salted = [{**body, "cache_salt": f"{number}-{i}"} for i in range(3)]
            answers = [pool.submit(text_of, parts.url, one) for one in salted]
            threading.Event().wait(delay_s)
            os.kill(parts.pid(name), signal.SIGKILL)
            parts.workers[name].popen.wait(10)
            parts.worker("prefill", f"p{number + 1}")
            assert [answer.result() for answer in answers] == [expected] * 3
            parts.wait_pairs(1)
    assert text_of(parts.url, body) == expected
    made_up_for = parts.metric("prefill_fallbacks_total") + parts.metric("migrations_total")
    assert made_up_for >= 6, "the kills must have met requests"
    parts.wait_no_block_held()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_decode_worker_killed_in_the_middle_changes_no_text(
    bench: Workbench, tmp_path: Path, strategy: str
) -> None:
    cost = costs(tmp_path / "cost.yaml", decode_ms=10)
    parts = Parts(bench, "--engine", "sim", "--sim-cost-model", cost, "--kv-transport", "tcp")
    parts.ingress("--strategy", strategy)
    parts.worker("prefill", "p0")
    parts.worker("decode", "d0")
    parts.worker("decode", "d1")
    parts.wait_ready()
    parts.wait_pairs(2)
    bodies = [completion([7 + n + i % 300 for i in range(100)], max_tokens=150) for n in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        expected = list(pool.map(lambda body: text_of(parts.url, body), bodies))
        answers = [pool.submit(text_of, parts.url, body) for body in bodies]
        threading.Event().wait(0.6)
        os.kill(parts.pid("d0"), signal.SIGKILL)
        assert [answer.result() for answer in answers] == expected
    assert parts.metric("migrations_total") >= 1
    parts.wait_no_block_held()


def test_a_prefill_worker_that_stands_still_costs_time_and_no_answer(
    bench: Workbench, tmp_path: Path
) -> None:
    parts = Parts(
        bench,
        *("--engine", "sim", "--kv-transport", "tcp"),
        *("--prefill-timeout-s", "1", "--canary-interval-s", "0"),
    )
    parts.ingress()
    parts.worker("decode", "d0")
    parts.worker("prefill", "p0")
    parts.wait_ready()
    body = completion([5 + i % 400 for i in range(300)])
    expected = text_of(parts.url, body)
    os.kill(parts.pid("p0"), signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert text_of(parts.url, {**body, "cache_salt": "x"}) == expected
        assert 0.9 < time.monotonic() - began < 5
        parts.wait(
            lambda: parts.metric("prefill_fallbacks_total", cause="prefill_timeout") == 1, "counted"
        )
    finally:
        os.kill(parts.pid("p0"), signal.SIGCONT)
    parts.wait_pairs(1)
    parts.wait_no_block_held()


def test_a_decode_worker_that_stands_still_is_given_up_at_the_deadline(bench: Workbench) -> None:
    """prefill_first: nobody fetches, the pins end, and the request goes to the other decode worker."""
    parts = Parts(
        bench,
        *("--engine", "sim", "--kv-transport", "tcp"),
        *("--handoff-min-timeout-s", "1", "--canary-interval-s", "0"),
    )
    parts.ingress("--strategy", "prefill_first")
    parts.worker("prefill", "p0")
    parts.worker("decode", "d0")
    parts.worker("decode", "d1")
    parts.wait_ready()
    parts.wait_pairs(2)
    body = completion([5 + i % 400 for i in range(300)])
    expected = text_of(parts.url, body)
    os.kill(parts.pid("d0"), signal.SIGSTOP)
    try:
        for number in range(2):  # one of them meets the worker that stands still
            began = time.monotonic()
            assert text_of(parts.url, {**body, "cache_salt": str(number)}) == expected
            assert time.monotonic() - began < 8
        parts.wait(lambda: parts.metric("handoffs_total", state="expired") >= 1, "expired")
    finally:
        os.kill(parts.pid("d0"), signal.SIGCONT)
    assert parts.metric("migrations_total") >= 1
    parts.wait_pairs(2)
    parts.wait_no_block_held()


def test_workers_join_and_leave_under_load(bench: Workbench, tmp_path: Path) -> None:
    cost = costs(tmp_path / "cost.yaml", prefill_ms_per_token=0.1, decode_ms=5)
    parts = Parts(bench, "--engine", "sim", "--sim-cost-model", cost, "--kv-transport", "tcp")
    parts.ingress()
    parts.worker("decode", "d0")
    parts.worker("prefill", "p0")
    parts.wait_ready()
    stop = threading.Event()
    answered: list[int] = []

    def load(number: int) -> None:
        body = completion([9 + number + i % 300 for i in range(150)], max_tokens=40)
        expected = text_of(parts.url, body)
        while not stop.is_set():
            assert text_of(parts.url, body) == expected
            answered.append(number)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        running = [pool.submit(load, number) for number in range(6)]
        try:
            parts.worker("prefill", "p1")
            parts.worker("decode", "d1")
            parts.wait_pairs(4)
            for name in ("p0", "d0"):
                parts.workers[name].signal(signal.SIGTERM)
                assert parts.workers[name].wait_end() == 0
            parts.wait_pairs(1)
            count = len(answered)
            parts.wait(lambda: len(answered) > count + 12, "going on")
        finally:
            stop.set()
        for one in running:
            one.result()
    parts.wait_no_block_held()


def test_two_deployments_do_not_see_each_other(bench: Workbench) -> None:
    first = bench.up("--disaggregated", "--engine", "sim", "--kv-transport", "tcp")[1]
    second = bench.up("--disaggregated", "--engine", "sim", "--kv-transport", "tcp")[1]
    body = completion("hello", 8)
    assert text_of(first, body) == text_of(second, body)
    for url in (first, second):
        workers = httpx.get(url + "/health").json()["models"]["demo"]["workers"]
        assert sorted(one["worker_id"] for one in workers) == ["decode-0", "prefill-0"]
        assert len(next(one for one in workers if one["role"] == "decode")["pairs"]) == 1


def test_decode_alone_is_not_ready_and_says_what_is_missing(bench: Workbench) -> None:
    parts = Parts(bench, "--engine", "sim", "--kv-transport", "tcp")
    parts.ingress()
    parts.worker("decode", "d0").wait_line("registered")

    def said() -> Any:
        return parts.get("/ready").json()

    parts.wait(lambda: "d0 has no prefill worker" in str(said()), "told")
    assert parts.get("/ready").status_code == 503
    refused = httpx.post(parts.url + "/v1/completions", json=completion("hi"), timeout=20)
    assert refused.status_code == 503
    assert "prefill worker" in refused.json()["error"]["message"]


def test_other_block_sizes_are_refused_and_both_are_shown(bench: Workbench) -> None:
    parts = Parts(bench, "--engine", "sim", "--kv-transport", "tcp")
    parts.ingress()
    decode = parts.worker("decode", "d0")
    parts.worker("prefill", "p0", "--set", "kv_cache_config.tokens_per_block=16")
    line = decode.wait_line("prefill worker refused.*block_size.*")
    assert "16" in line.group(0)
    assert "32" in line.group(0)
    parts.wait(lambda: "block_size" in parts.get("/ready").text, "told")


def test_a_missing_transport_says_what_to_install(bench: Workbench, tmp_path: Path) -> None:
    broken = tmp_path / "site" / "ucxx"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no such package', name='ucxx')\n")
    site = {"PYTHONPATH": str(broken.parent)}
    parts = Parts(bench, "--engine", "sim")
    parts.ingress()
    worker = parts.worker("prefill", "p0", **site)
    worker.wait_line(r"pip install 'trtllm-launch\[ucx\]'")
    assert worker.wait_end() == 2
    auto = parts.worker("prefill", "p1", "--kv-transport", "auto", **site)
    auto.wait_line("KV transport started.*transport=nixl")

"""A worker that is killed while a run serves is there again, under its name, and serves."""

from __future__ import annotations

import os
import re
import signal

import httpx
import pytest

from tests.e2e.harness import SIM_COSTS, Workbench

SIM = ("--engine", "sim", "--sim-cost-model", str(SIM_COSTS / "10ms.yaml"))
BODY = {
    "model": "demo",
    "prompt": "Hello",
    "max_tokens": 4,
    "ignore_eos": True,
    "temperature": 0,
}


def test_a_killed_worker_is_started_again_and_serves(bench: Workbench) -> None:
    run, url = bench.up(*SIM, "--max-restarts", "1")
    with httpx.Client(base_url=url, timeout=30) as http:
        assert http.post("/v1/completions", json=BODY).status_code == 200
        first = bench.pid_of("worker-0")
        os.kill(first, signal.SIGKILL)
        run.wait_line(r"worker-0 was killed by SIGKILL")
        run.wait_line(r"worker-0 is started again in 1\.0 s \(restart 1 of 1 within 10 minutes\)")
        run.wait_line(r"worker-0 is ready again after")
        assert bench.pid_of("worker-0") != first
        # The ingress hears of the new worker a moment later, by discovery.
        while (answer := http.post("/v1/completions", json=BODY)).status_code in (404, 503):
            assert "worker" in answer.text or "model" in answer.text
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 4
        os.kill(bench.pid_of("worker-0"), signal.SIGKILL)
    assert run.wait_end() == 4
    assert "it had been started again once (--max-restarts 1 within 10 minutes)" in run.output
    bench.wait_empty()


def test_ps_shows_how_often_a_worker_was_started_again(bench: Workbench) -> None:
    run, _ = bench.up(*SIM)
    os.kill(bench.pid_of("worker-0"), signal.SIGKILL)
    run.wait_line(r"worker-0 is ready again after")
    listed = bench.run("ps").output
    assert listed.splitlines()[0].endswith("RESTARTS"), listed
    assert re.search(r"worker-0 .* 1$", listed, flags=re.MULTILINE), listed
    run.signal(signal.SIGTERM)
    assert run.wait_end() == 0
    bench.wait_empty()


def test_a_stream_goes_on_at_the_other_worker_while_one_is_started_again(bench: Workbench) -> None:
    run, url = bench.up(*SIM, "--num-workers", "2")
    with httpx.Client(base_url=url, timeout=30) as http:
        os.kill(bench.pid_of("worker-0"), signal.SIGKILL)
        for _ in range(20):
            assert http.post("/v1/completions", json=BODY).status_code == 200
        run.wait_line(r"worker-0 is ready again after")
        assert http.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_either_half_of_a_pair_is_started_again_and_paired_anew(
    bench: Workbench, name: str
) -> None:
    run, url = bench.up("--engine", "sim", "--disaggregated", "--max-local-prefill-length", "0")
    prompt = "A prompt of more than one block. " * 8
    with httpx.Client(base_url=url, timeout=30) as http:
        whole = http.post("/v1/completions", json={**BODY, "prompt": prompt}).json()
        os.kill(bench.pid_of(name), signal.SIGKILL)
        run.wait_line(rf"{name} is ready again after")
        while (answer := http.post("/v1/completions", json={**BODY, "prompt": prompt})).is_error:
            assert answer.status_code in (404, 503), answer.text
        assert answer.json()["choices"][0]["text"] == whole["choices"][0]["text"]
    while not re.search(r"decode-0 +prefill-0 .* ready$", (listed := bench.run("ps").output), re.M):
        assert not re.search("refused|mismatch", listed), listed

"""Mode kv with real processes: where requests go, what the caches give, and workers that die."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import httpx
import pytest

from tests.e2e.harness import Workbench

SYSTEM = "You answer questions about launchers in short and friendly sentences. " * 4


def chat(http: httpx.Client, user: str, **fields: Any) -> httpx.Response:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    body = {"model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    answer = http.post(
        "/v1/chat/completions", json=body, headers={"x-trtllm-launch-explain": "yes"}
    )
    assert answer.status_code == 200, answer.text
    return answer


def cached(answer: httpx.Response) -> int:
    details = answer.json()["usage"]["prompt_tokens_details"]
    return int(details["cached_tokens"])


@pytest.mark.parametrize(
    "options",
    [
        ("--num-workers", "3"),
        ("--disaggregated", "--strategy", "prefill_first", "--num-prefill-workers", "2"),
        ("--disaggregated", "--strategy", "decode_first", "--num-prefill-workers", "2"),
    ],
    ids=["aggregated", "prefill_first", "decode_first"],
)
def test_a_prompt_goes_back_to_where_it_is_cached(
    bench: Workbench, options: tuple[str, ...]
) -> None:
    _, url = bench.up("--engine", "sim", "--router-mode", "kv", *options)
    name = "worker" if "--num-workers" in options else "prefill"
    with httpx.Client(base_url=url, timeout=30) as http:
        used = {}
        for user in ("What is ENGINE?", "What is UCX?", "What is NATS?", "What is etcd?"):
            first, again = chat(http, user), chat(http, user)
            route = again.headers["x-trtllm-launch-route"]
            found = re.search(rf"{name}=(\S+) \(overlap (\d+)/", route)
            assert found, route
            assert int(found[2]) >= 64
            if name == "worker":
                assert f"worker={found[1]} " in first.headers["x-trtllm-launch-route"]
                assert cached(again) >= 64
            used[user] = found[1]
            assert first.json()["choices"] == again.json()["choices"]
        told = bench.run("explain", "--url", url).output
        assert used["What is etcd?"] in told.splitlines()[1]
        told = bench.run("explain", again.json()["id"], "--url", url).output
        assert "lowest cost" in told
        metrics = http.get("/metrics").text
        [rate] = re.findall(r'router_hit_ratio{model="demo"} (\S+)', metrics)
        assert 0.3 < float(rate) < 1


def test_a_worker_that_is_started_again_holds_nothing_and_is_routed_to_anew(
    bench: Workbench,
) -> None:
    run, url = bench.up("--engine", "sim", "--router-mode", "kv", "--num-workers", "2")
    with httpx.Client(base_url=url, timeout=30) as http:
        chat(http, "What is ENGINE?")
        holder = re.search(
            r"worker=(\S+) ", chat(http, "What is ENGINE?").headers["x-trtllm-launch-route"]
        )
        assert holder
        os.kill(bench.pid_of(holder[1]), signal.SIGKILL)
        assert cached(chat(http, "What is ENGINE?")) == 0, "the other one computes it"
        run.wait_line(rf"{holder[1]} is ready again after")
        workers: list[dict[str, Any]] = []
        while not workers or any(one["state"] != "ready" for one in workers):
            workers = http.get("/router").json()["workers"]
        answer = chat(http, "What is ENGINE?")
        assert holder[1] not in answer.headers["x-trtllm-launch-route"].split("(")[0]
        assert cached(answer) >= 64


def test_without_events_the_router_learns_from_its_own_choices(bench: Workbench) -> None:
    _, url = bench.up(
        *("--engine", "sim", "--router-mode", "kv", "--router-events", "off", "--num-workers", "2")
    )
    with httpx.Client(base_url=url, timeout=30) as http:
        answers = [chat(http, "What is ENGINE?") for _ in range(5)]
        assert all(cached(one) >= 64 for one in answers[1:])
        assert http.get("/router").json()["follows_events"] is False


def test_two_ingresses_route_alike(bench: Workbench) -> None:
    shared = ("--discovery", (bench.path / "shared").as_uri())
    _, url = bench.up("--engine", "sim", "--router-mode", "kv", "--num-workers", "3", *shared)
    other = bench.start("ingress", "--http-port", "0", "--router-mode", "kv", *shared)
    second = other.wait_line(r"listening .*url=(http://\S+)").group(1)
    with httpx.Client(base_url=url, timeout=30) as one, httpx.Client(base_url=second) as two:
        while two.get("/ready").status_code != 200:
            pass
        for user in ("What is ENGINE?", "What is UCX?", "What is etcd?"):
            chat(one, user)
            first = chat(one, user).headers["x-trtllm-launch-route"].split("(")[0]
            answer = chat(two, user)
            assert answer.headers["x-trtllm-launch-route"].split("(")[0] == first
            assert cached(answer) >= 64

"""The launcher with TensorRT-LLM on a GPU: aggregated, disaggregated, and the same text from both."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
from functools import partial

import pytest

from tests.e2e.harness import Process, Workbench
from tests.e2e.parts import Parts, completion, text_of

PROMPTS = [
    "What is prefill?",
    "Tell me about KV blocks. " * 30,
    "Tell me about KV blocks. " * 30 + "And then?",
    "A long prompt that needs more than one step. " * 200,
]
HALF = ("--set", "kv_cache_config.free_gpu_memory_fraction=0.3", "--set", "max_seq_len=4096")


def up(bench: Workbench, *words: str) -> tuple[Process, str]:
    process = bench.start("up", "--http-port", "0", *HALF, *words)
    return process, process.wait_line(r"^ready after .* at (http://\S+)/v1$", 900.0).group(1)


def answers(url: str) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(partial(text_of, url), [completion(prompt) for prompt in PROMPTS]))


def stop(run: Process) -> None:
    run.signal(signal.SIGINT)
    run.wait_end(120.0)


def apart(gpus: tuple[str, ...]) -> tuple[str, ...]:
    """Give each role its GPU, the same one when there is no other."""
    return (
        *("--prefill-cuda-visible-devices", gpus[0]),
        *("--decode-cuda-visible-devices", gpus[-1]),
    )


@pytest.mark.parametrize("transport", ["ucx", "nixl"])
@pytest.mark.parametrize("strategy", ["decode_first", "prefill_first"])
def test_disaggregated_answers_equal_aggregated_ones(
    bench: Workbench, gpus: tuple[str, ...], strategy: str, transport: str
) -> None:
    run, url = up(bench)
    expected = answers(url)
    stop(run)
    words = ("--disaggregated", "--strategy", strategy, "--kv-transport", transport)
    run, url = up(bench, *words, *apart(gpus))
    for _round in range(2):
        assert answers(url) == expected
    parts = Parts(bench)
    parts.url = url
    assert parts.metric("prefill_fallbacks_total") == 0
    listed = bench.run("ps").output
    assert re.search(rf"decode-0\s+prefill-0\s+engine-native\s+{transport.upper()}\s", listed)
    stop(run)
    bench.wait_empty(60.0)


def test_a_killed_worker_is_started_again_and_serves(bench: Workbench) -> None:
    run, url = up(bench)
    expected = answers(url)
    os.kill(bench.pid_of("worker-0"), signal.SIGKILL)
    run.wait_line(r"worker-0.*1 of 3", 60.0)
    parts = Parts(bench)
    parts.url = url
    parts.wait(lambda: parts.get("/ready").json() == {"status": "ready"}, "ready again")
    assert answers(url) == expected
    stop(run)
    bench.wait_empty(60.0)

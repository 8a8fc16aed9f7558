"""Whole runs on a real SLURM cluster, started by the scripts that people copy."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from tests.slurm.cluster import MiniCluster
from tests.slurm.driver import (
    CLI,
    Driver,
    below,
    cmdline,
    completion,
    get,
    left_on,
    nodes_by_rank,
    post,
    started,
)

AGGREGATED = "multinode/srun_aggregated.sh"
DISAGGREGATED = "multinode/srun_disaggregated.sh"
PROMPTS = (
    "What is a handoff?",
    "Tell me about the router, and what it does with prompts that it has seen before.",
    "To be or not to be",
)
# A port that another program may hold is no part of these tests.
FREE = ("--http-port", "0")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs with a space"


@pytest.fixture(scope="module")
def texts(mini_cluster: MiniCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an aggregated worker of one rank answers: the truth for all other shapes."""
    folder = tmp_path_factory.mktemp("truth")
    with started(mini_cluster, folder, AGGREGATED, *FREE, nodes=1) as driver:
        url = driver.url()
        return {prompt: completion(url, prompt) for prompt in PROMPTS}


def wait_until_clean(cluster: MiniCluster, nodes: tuple[str, ...], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while left := left_on(cluster, nodes):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)  # SLURM ends steps in its own time


def only_history(runs: Path) -> bool:
    return [path.name for path in runs.iterdir()] == ["history"]


def test_one_mpi_world_over_two_nodes(
    mini_cluster: MiniCluster, runs: Path, texts: dict[str, str]
) -> None:
    words = (AGGREGATED, *FREE, "--set", "tensor_parallel_size=2")
    with started(mini_cluster, runs, *words, nodes=2, NUM_NODES="2") as driver:
        url = driver.url()
        assert "[worker-0/1]" in driver.text, "each rank's lines say whose they are"
        logs = next(runs.glob("*/logs"))
        assert "rank 1" in (logs / "worker-0.rank1.log").read_text()
        assert {prompt: completion(url, prompt) for prompt in PROMPTS} == texts
        nodes = nodes_by_rank(mini_cluster, runs)
        assert nodes["worker-0", 0] != nodes["worker-0", 1]
        assert nodes["worker-0", 0] == nodes["ingress", 0]
        shown = mini_cluster.run([str(CLI), "slurm", "status", "--run-dir", str(runs)]).stdout
        assert "following: rank 0" in shown
        assert driver.interrupt() == 130
    wait_until_clean(mini_cluster, mini_cluster.nodes)
    assert only_history(runs)


@pytest.mark.parametrize("strategy", ["decode_first", "prefill_first"])
def test_disaggregated_on_four_nodes_over_ucx(
    mini_cluster: MiniCluster, runs: Path, texts: dict[str, str], strategy: str
) -> None:
    shape = {"NUM_PREFILL_WORKERS": "2", "NUM_DECODE_WORKERS": "2", "KV_TRANSPORT": "ucx"}
    shape["DISAGGREGATION_STRATEGY"] = strategy
    with started(mini_cluster, runs, DISAGGREGATED, *FREE, nodes=4, **shape) as driver:
        url = driver.url()
        for _ in range(2):
            assert {prompt: completion(url, prompt) for prompt in PROMPTS} == texts
        workers = get(f"{url}/health")["models"]["demo"]["workers"]
        hosts = {one["address"].rpartition("@")[2].rpartition(":")[0] for one in workers}
        assert len(hosts) == 4, "each worker has a node of its own"
        assert any(one["stats"].get("prompt_tokens") for one in workers if one["role"] == "prefill")
        assert driver.interrupt() == 130
        # Nobody was made to end: every part drained.
        assert "had to be killed" not in driver.text
        assert "Killed" not in driver.text
    wait_until_clean(mini_cluster, mini_cluster.nodes)


def test_a_submitted_job_with_its_own_etcd_is_followed_shown_and_stopped(
    mini_cluster: MiniCluster, runs: Path, texts: dict[str, str]
) -> None:
    words = (DISAGGREGATED, *FREE, "--services", "etcd", "--kv-transport", "tcp")
    with started(mini_cluster, runs, *words) as driver:
        url = driver.url()
        assert driver.wait() == 0
        assert "job goes on by itself" in driver.text.replace("job " + job_of(driver), "job")
    assert completion(url, PROMPTS[0]) == texts[PROMPTS[0]]
    status = mini_cluster.run([str(CLI), "slurm", "status", "--run-dir", str(runs)]).stdout
    assert "etcd://10.77.0.11:" in status
    assert "registered" in status
    done = mini_cluster.run([str(CLI), "slurm", "stop", "--run-dir", str(runs)], timeout_s=90)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until_clean(mini_cluster, mini_cluster.nodes)
    assert mini_cluster.run(["squeue", "--noheader"]).stdout.strip() == ""
    assert only_history(runs)


def num_filled(url: str) -> float:
    """Return how many prompts prefill workers took from the queue and wrote into decode's blocks."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if re.match(r"\w*prefill_queue_jobs_total{.*filled", line)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def test_the_prefill_queue_has_a_nats_server_on_the_head_node(
    mini_cluster: MiniCluster, runs: Path, texts: dict[str, str]
) -> None:
    shape = {"PREFILL_DISPATCH": "queue", "KV_TRANSPORT": "tcp"}
    with started(mini_cluster, runs, DISAGGREGATED, *FREE, nodes=2, **shape) as driver:
        url = driver.url()
        assert {prompt: completion(url, prompt) for prompt in PROMPTS} == texts
        nodes = nodes_by_rank(mini_cluster, runs)
        assert nodes["nats", 0] == nodes["ingress", 0]
        deadline = time.monotonic() + 20
        while num_filled(url) < len(PROMPTS):
            assert time.monotonic() < deadline
            time.sleep(0.2)  # workers tell the ingress what they did every now and then
        assert driver.interrupt() == 130
    wait_until_clean(mini_cluster, mini_cluster.nodes)


def test_a_node_is_lost_under_load(mini_cluster: MiniCluster, runs: Path) -> None:
    shape = {"NUM_PREFILL_WORKERS": "1", "NUM_DECODE_WORKERS": "2", "KV_TRANSPORT": "ucx"}
    with started(mini_cluster, runs, DISAGGREGATED, *FREE, nodes=3, **shape) as driver:
        url = driver.url()
        expected = completion(url, PROMPTS[0], 60)
        node = nodes_by_rank(mini_cluster, runs)["decode-1", 0]
        done = threading.Event()

        def ask() -> list[str]:
            found = []
            while not done.is_set():
                found.append(completion(url, PROMPTS[0], 60))
            return found

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask) for _ in range(8)]
            try:
                mini_cluster.kill_node(node)
                driver.wait_for(f"decode-1 is lost: node {node} ", timeout_s=60)
            finally:
                done.set()
            answers = [text for one in asking for text in one.result(timeout=60)]
        assert len(answers) > 8
        assert set(answers) == {expected}, "nobody got an error or another text"
        assert "1 decode worker goes on" in driver.text
        assert driver.interrupt() == 130
    mini_cluster.start_node(node)
    wait_until_clean(mini_cluster, mini_cluster.nodes)


def test_a_cancelled_job_leaves_nothing_and_the_next_finds_its_nodes_free(
    mini_cluster: MiniCluster, runs: Path, texts: dict[str, str]
) -> None:
    words = (AGGREGATED, *FREE, "--set", "tensor_parallel_size=2", "--num-nodes", "2")
    with started(mini_cluster, runs, *words) as driver:
        driver.url()
        job_id = job_of(driver)
    mini_cluster.run(["scancel", job_id])
    wait_until_clean(mini_cluster, mini_cluster.nodes)
    kept = [
        path for path in runs.glob("*/*") if path.name != "logs" and path.parent.name != "history"
    ]
    assert kept == [], "nothing but logs"
    with started(mini_cluster, runs, AGGREGATED, *FREE, nodes=2) as driver:
        assert completion(driver.url(), PROMPTS[1]) == texts[PROMPTS[1]]
        assert driver.interrupt() == 130


def test_a_killed_driver_ends_its_steps(mini_cluster: MiniCluster, runs: Path) -> None:
    with started(mini_cluster, runs, AGGREGATED, *FREE, nodes=1) as driver:
        driver.url()
        pids = [pid for pid in below(driver.popen.pid) if b"slurm\0run" in cmdline(pid)]
        os.kill(pids[-1], signal.SIGKILL)
        driver.wait()
    wait_until_clean(mini_cluster, mini_cluster.nodes)


def test_a_rank_that_dies_ends_the_start_and_is_named_with_its_last_lines(
    mini_cluster: MiniCluster, runs: Path
) -> None:
    words = (AGGREGATED, *FREE, "--set", "tensor_parallel_size=2", "--num-nodes", "2")
    with started(mini_cluster, runs, *words, "--max-restarts", "0", nodes=2) as driver:
        driver.url()
        # As the kernel does when memory runs out.
        node = nodes_by_rank(mini_cluster, runs)["worker-0", 1]
        done = mini_cluster.exec(
            node,
            [
                *("bash", "-c"),
                "for p in /proc/[0-9]*; do tr '\\0' '\\n' <$p/environ 2>/dev/null | "
                "grep -q '^SLURM_PROCID=1$' && grep -qz worker $p/cmdline && kill -9 ${p#/proc/}; done; true",
            ],
        )
        assert done.returncode == 0
        assert driver.wait() == 4
        assert f"rank 1 of worker-0 on {node} was killed by SIGKILL" in driver.text
    assert list(runs.glob("history/*/logs/worker-0.rank1.log")), "its words stay"
    first = next(runs.glob("history/*/first_error.txt")).read_text()
    assert first.startswith("first error: worker-0 rank 1")
    wait_until_clean(mini_cluster, mini_cluster.nodes)


def test_two_jobs_side_by_side(mini_cluster: MiniCluster, runs: Path) -> None:
    with (
        started(mini_cluster, runs, AGGREGATED, *FREE, nodes=1) as one,
        started(mini_cluster, runs, AGGREGATED, *FREE, nodes=1) as other,
    ):
        urls = {one.url(), other.url()}
        assert len(urls) == 2
        for url in urls:
            assert post(f"{url}/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 1})
        assert one.interrupt() == 130
        assert completion(other.url(), "still there")
        assert other.interrupt() == 130
    wait_until_clean(mini_cluster, mini_cluster.nodes)


def job_of(driver: Driver) -> str:
    return driver.wait_for(" is job ").split(" is job ", 1)[1].split()[0]

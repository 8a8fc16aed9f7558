"""Starting, ending and dying of real processes: who says what, and what is left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket

import httpx

from tests.e2e.harness import DEMO, SIM_COSTS, Workbench

SIM = ("--engine", "sim", "--sim-cost-model", str(SIM_COSTS / "10ms.yaml"))


def body(max_tokens: int) -> dict[str, object]:
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": "go on"}],
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }


def test_ctrl_c_ends_everything_with_130(bench: Workbench) -> None:
    run, url = bench.up(*SIM)
    assert len(bench.survivors()) >= 3
    run.signal(signal.SIGINT)
    assert run.wait_end() == 130
    bench.wait_empty()
    assert not list(bench.run_dir.glob("*/run.json"))
    host, port = re.search(r"//([\d.]+):(\d+)", url).groups()  # type: ignore[union-attr]
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


def test_the_ladder_names_each_step(bench: Workbench) -> None:
    run, _ = bench.up(*SIM)
    for step in ("starting", "registered", "listening on", "for one token"):
        assert step in run.output, run.output


def test_stop_from_another_terminal_ends_the_run(bench: Workbench) -> None:
    run, _ = bench.up(*SIM)
    listed = bench.run("ps")
    assert re.search(r"worker-0 +\d+ +aggregated", listed.output), listed.output
    stopped = bench.run("stop")
    assert stopped.popen.returncode == 0, stopped.output
    run.wait_end()
    bench.wait_empty()


def test_nothing_survives_a_killed_launcher(bench: Workbench) -> None:
    run, _ = bench.up(*SIM)
    run.signal(signal.SIGKILL)
    run.wait_end()
    bench.wait_empty()
    listed = bench.run("ps")
    assert listed.popen.returncode == 0
    stopped = bench.run("stop", "--all")
    assert stopped.popen.returncode == 0, stopped.output
    assert not list(bench.run_dir.glob("*/run.json"))


def test_a_killed_worker_ends_the_run_and_is_named(bench: Workbench) -> None:
    run, url = bench.up(*SIM, "--max-restarts", "0")
    pid = bench.pid_of("worker-0")
    with (
        httpx.Client(base_url=url, timeout=30) as http,
        http.stream("POST", "/v1/chat/completions", json=body(1500)) as stream,
    ):
        lines = stream.iter_lines()
        for _ in range(12):
            next(lines)
        os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data: ")]
    errors = [json.loads(line[6:]) for line in rest if '"error"' in line]
    assert errors, rest[-3:]
    assert "worker-0" in errors[0]["error"]["message"]
    assert run.wait_end() == 4
    assert re.search(r"worker-0 .*SIGKILL", run.output), run.output
    bench.wait_empty()


def test_a_client_that_leaves_frees_its_blocks(bench: Workbench) -> None:
    _, url = bench.up(*SIM)

    def gauge(http: httpx.Client, pattern: str) -> float:
        found = re.search(rf"^{pattern} (\S+)$", http.get("/metrics").text, flags=re.MULTILINE)
        return float(found.group(1)) if found else -1.0

    with httpx.Client(base_url=url, timeout=30) as http:
        with http.stream("POST", "/v1/chat/completions", json=body(1500)) as stream:
            next(stream.iter_lines())
        # A later answer passes engine steps; the load is told about once a second.
        while (
            gauge(http, r'trtllm_launch_engine_blocks\{state="active",worker_id="worker-0"\}') != 0
        ):
            http.post("/v1/completions", json={"model": "demo", "prompt": "x", "max_tokens": 2})
        assert gauge(http, r'trtllm_launch_aborted_requests_total\{cause="client[a-z_]*"\}') >= 1


def test_two_runs_side_by_side_do_not_see_each_other(bench: Workbench) -> None:
    first, first_url = bench.up(*SIM, "--served-model-name", "one")
    _, second_url = bench.up(*SIM, "--served-model-name", "two")
    for url, name in ((first_url, "one"), (second_url, "two")):
        listed = httpx.get(f"{url}/v1/models", timeout=10).json()
        assert [model["id"] for model in listed["data"]] == [name]
    first.signal(signal.SIGINT)
    first.wait_end()
    assert httpx.get(f"{second_url}/ready", timeout=10).status_code == 200


def test_a_port_in_use_is_told_before_anything_starts(bench: Workbench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = bench.run("up", *SIM, "--http-port", str(port))
    assert run.popen.returncode == 2
    assert str(port) in run.output
    assert str(os.getpid()) in run.output  # who holds it
    assert "--http-port" in run.output


def test_an_unknown_engine_config_key_is_told_with_its_line(bench: Workbench) -> None:
    config = bench.path / "agg.yaml"
    config.write_text("max_batch_size: 8\nkv_cache_config:\n  tokens_per_blok: 32\n")
    run = bench.run("up", *SIM, AGG_ENGINE_ARGS=str(config))
    assert run.popen.returncode == 2
    assert "agg.yaml:3" in run.output
    assert "tokens_per_block" in run.output


def test_a_missing_model_folder_is_told(bench: Workbench) -> None:
    run = bench.run("up", "--http-port", "0", MODEL_PATH="/no/such/model")
    assert run.popen.returncode == 2
    assert "/no/such/model" in run.output
    assert "Traceback" not in run.output


def test_broken_weights_are_told_with_the_file(bench: Workbench) -> None:
    broken = bench.path / "broken"
    shutil.copytree(DEMO, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    run = bench.run("up", "--http-port", "0", "--engine", "torch", MODEL_PATH=str(broken))
    assert run.popen.returncode in (2, 3)
    assert "model.safetensors" in run.output
    assert "Traceback" not in run.output
    bench.wait_empty()


def test_separate_processes_find_each_other_and_a_stream_outlives_its_worker(
    bench: Workbench,
) -> None:
    place = ("--discovery", f"file://{bench.path / 'discovery'}")
    workers = [
        bench.start("worker", *SIM, *place, "--worker-id", name) for name in ("left", "right")
    ]
    for process in workers:
        process.wait_line("registered")
    ingress = bench.start("ingress", *place, "--http-port", "0")
    url = ingress.wait_line(r"listening.*(http://[\d.:]+)").group(1)
    for name in ("left", "right"):
        ingress.wait_line(f"worker connected .*{name}")
    ingress.wait_line("tokenizer loaded")
    with httpx.Client(base_url=url, timeout=30) as http:
        whole = http.post("/v1/chat/completions", json={**body(120), "stream": False}).json()
        with http.stream("POST", "/v1/chat/completions", json=body(120)) as stream:
            lines = stream.iter_lines()
            got = [next(lines) for _ in range(20)]
            holder = _busy(http)
            workers[("left", "right").index(holder)].signal(signal.SIGKILL)
            got += list(lines)
    events = [json.loads(line[6:]) for line in got if line.startswith("data: {")]
    assert not [event for event in events if "error" in event]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert text == whole["choices"][0]["message"]["content"]


def _busy(http: httpx.Client) -> str:
    """Return the worker that holds the one stream, as /health tells it."""
    health = http.get("/health").json()
    for model in health["models"].values():
        for worker in model["workers"]:
            if worker["streams_from_here"] > 0:
                return str(worker["worker_id"])
    raise AssertionError(health)

"""Engine trtllm in real processes, TensorRT-LLM itself being the fake of ``tests/fakes/trtllm``.

The fake computes with the torch engine, so answers are those that engine torch gives, token for token.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.e2e.harness import Process, Workbench
from tests.e2e.parts import Parts, completion, text_of

FAKES = Path(__file__).resolve().parents[1] / "fakes"
STRATEGIES = ["decode_first", "prefill_first"]
PROMPTS = [
    "What is prefill?",
    "Tell me about KV blocks. " * 12,
    "Tell me about KV blocks. " * 12 + "And then?",
    "A long prompt that needs more than one step. " * 40,
]
# The demo model on a CPU: TensorRT-LLM's defaults are meant for a GPU's memory.
SMALL = ("--set", "max_num_tokens=512", "--set", "max_batch_size=16")


@pytest.fixture
def gpu_host(bench: Workbench) -> Workbench:
    """A bench whose processes see eight GPUs and TensorRT-LLM 1.2.1."""
    programs = bench.path / "bin"
    programs.mkdir()
    smi = programs / "nvidia-smi"
    # Answers whatever columns are asked for: name, memory, driver, compute capability.
    smi.write_text(
        "#!/usr/bin/env python3\n"
        "import sys\n"
        "facts = {'index': '{i}', 'name': 'NVIDIA H200', 'memory.total': '143771', 'memory.used': '0',\n"
        "         'memory.free': '143771', 'driver_version': '590.44', 'compute_cap': '9.0', 'count': '8'}\n"
        "query = next((one for one in sys.argv if one.startswith('--query-gpu=')), '')\n"
        "for i in range(8 if query else 0):\n"
        "    print(', '.join(facts.get(one, '').format(i=i) for one in query[12:].split(',')))\n"
    )
    smi.chmod(0o755)
    path = f"{programs}:{FAKES / 'trtllm' / 'bin'}:{bench.environ['PATH']}"
    bench.environ |= {
        "PATH": path,
        "PYTHONPATH": str(FAKES / "trtllm"),
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "ENGINE": "trtllm",
    }
    return bench


def stop(run: Process) -> None:
    run.signal(signal.SIGINT)
    run.wait_end()


@pytest.fixture
def expected(served: str) -> list[str]:
    return [text_of(served, completion(prompt)) for prompt in PROMPTS]


def answers(url: str) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(partial(text_of, url), [completion(prompt) for prompt in PROMPTS]))


def test_aggregated_answers_are_the_models(gpu_host: Workbench, expected: list[str]) -> None:
    run, url = gpu_host.up(*SMALL)
    assert answers(url) == expected
    stop(run)
    gpu_host.wait_empty()


@pytest.mark.parametrize("transport", ["ucx", "nixl"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_disaggregated_answers_equal_aggregated_ones(
    gpu_host: Workbench, expected: list[str], strategy: str, transport: str
) -> None:
    run, url = gpu_host.up(
        *("--disaggregated", "--strategy", strategy, "--kv-transport", transport, *SMALL)
    )
    for _round in range(2):
        assert answers(url) == expected
    parts = Parts(gpu_host)
    parts.url = url
    moved = 2 * len(PROMPTS) + 1  # the gate's probe
    parts.wait(lambda: parts.metric("kv_transfers_total") == moved, "counted")
    assert parts.metric("prefill_fallbacks_total") == 0
    # What TensorRT-LLM's own log said, and not what was asked for.
    listed = gpu_host.run("ps")
    assert re.search(
        rf"decode-0\s+prefill-0\s+engine-native\s+{transport.upper()}\s", listed.output
    )
    stop(run)
    gpu_host.wait_empty()


def test_a_worker_of_two_ranks_is_one_mpi_world(gpu_host: Workbench, expected: list[str]) -> None:
    beside = Path(sys.executable).parent  # the mpirun of this environment's MPICH
    gpu_host.environ["PATH"] = f"{beside}:{gpu_host.environ['PATH']}"
    run, url = gpu_host.up("--set", "tensor_parallel_size=2", *SMALL)
    assert answers(url) == expected
    commands = [one for one in gpu_host.survivors().values() if " worker --worker-id" in one]
    assert sum("mpiexec" not in one and "mpirun" not in one for one in commands) == 2
    assert "run mgmn worker node with mpi_world_size: 2" in run.output  # TensorRT-LLM's own loop
    stop(run)
    gpu_host.wait_empty()


def test_a_worker_whose_engine_fails_is_started_again(
    gpu_host: Workbench, expected: list[str]
) -> None:
    run, url = gpu_host.up(*SMALL)
    os.kill(gpu_host.pid_of("worker-0"), signal.SIGKILL)
    run.wait_line(r"worker-0.*(1 of 3|restart)")
    parts = Parts(gpu_host)
    parts.url = url
    parts.wait_ready()
    assert answers(url) == expected
    stop(run)
    gpu_host.wait_empty()


@pytest.mark.parametrize(
    ("seed", "said"),
    [(666001, "illegal memory access"), (666002, "the engine stands still")],
    ids=["breaks", "wedges"],
)
def test_an_engine_that_breaks_or_stands_still_is_replaced(
    gpu_host: Workbench, expected: list[str], seed: int, said: str
) -> None:
    """The stand-in breaks at one seed, and at another takes requests of which nothing comes."""
    gpu_host.environ["FAKE_TRTLLM_SEEDS"] = "1"
    run, url = gpu_host.up("--stall-timeout-s", "3", "--drain-timeout-s", "1", *SMALL)
    body = {**completion("What is prefill?"), "seed": seed, "temperature": 0.5, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
        assert "error" in answer.read().decode()
    run.wait_line(said)
    run.wait_line(r"worker-0.*1 of 3")
    parts = Parts(gpu_host)
    parts.url = url
    parts.wait_ready()
    assert answers(url) == expected
    stop(run)
    gpu_host.wait_empty()


def test_a_log_that_tells_of_another_transport_ends_the_start(gpu_host: Workbench) -> None:
    run = gpu_host.run(
        *("up", "--http-port", "0", "--disaggregated", "--kv-transport", "ucx", *SMALL),
        FAKE_TRTLLM_MARKER="NixlTransferAgent",
    )
    assert run.popen.returncode == 3
    assert "KV was to be moved by UCX, but TensorRT-LLM's log says NIXL" in run.output
    gpu_host.wait_empty()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"PYTHONPATH": ""}, "TensorRT-LLM is not installed"),
        ({"PYTHONPATH": str(FAKES / "dist_info" / "1.2.0")}, "1.2.0"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "tensor_parallel_size 4 needs 4 GPUs"),
    ],
    ids=["missing", "wrong version", "no GPU", "too few GPUs"],
)
def test_what_is_missing_is_said_before_anything_starts(
    gpu_host: Workbench, environ: dict[str, str], said: str
) -> None:
    run = gpu_host.run("up", "--set", "tensor_parallel_size=4", **environ)
    assert run.popen.returncode == 2
    assert said in run.output
    assert "ready" not in run.output


def test_a_wrong_key_is_found_before_anything_starts(gpu_host: Workbench) -> None:
    config = gpu_host.path / "decode.yaml"
    config.write_text("moe_config:\n  backend: WIFEEP\n")
    run = gpu_host.run("up", "--engine-config", str(config))
    assert run.popen.returncode == 2
    assert "decode.yaml:2" in run.output
    assert "WIDEEP" in run.output

"""``trtllm-launch bench`` on real deployments of the sim engine."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.e2e.harness import SIM_COSTS, Workbench

FREE, PACED = str(SIM_COSTS / "free.yaml"), str(SIM_COSTS / "10ms.yaml")
VERDICT_TIMEOUT_S = 50.0
SMALL = ("--isl", "64", "--osl", "8")


def test_a_sweep_leaves_figures_records_and_a_picture(bench: Workbench) -> None:
    _, url = bench.up("--engine", "sim", "--sim-cost-model", PACED)
    told = bench.run(
        *("bench", "--url", url, "--concurrency", "1,4", *SMALL, "--client", "own"),
        *("--mode", "aggregated", "--tp", "1", "--dp", "1"),
    )
    assert told.popen.returncode == 0, told.output
    folder = bench.path / "artifacts_root" / "artifacts_0"
    results = json.loads((folder / "results.json").read_text())
    assert [level["num_good"] for level in results["levels"]] == [10, 40]
    assert [level["num_failed"] for level in results["levels"]] == [0, 0]
    assert [level["output_tokens"] for level in results["levels"]] == [80, 320]
    assert results["deployment"]["num_workers"] == {"aggregated": 1}
    lines = (folder / "concurrency4" / "requests.jsonl").read_text().splitlines()
    assert len(lines) == 40
    assert {json.loads(line)["prompt_tokens"] for line in lines} == {64}
    assert "<svg" in (folder / "results.svg").read_text()
    config = json.loads((folder / "deployment_config.json").read_text())
    assert (config["mode"], config["tensor_parallelism"]) == ("aggregated", 1)

    wrong = bench.run("bench", "--url", url, *SMALL, "--mode", "disaggregated", "--tp", "2")
    assert wrong.popen.returncode == 2
    assert "--mode says disaggregated, the server is aggregated" in wrong.output
    assert "--tp says 2 ranks in each worker (aggregated), the server has 1" in wrong.output

    failing = bench.run(
        *("bench", "--url", url, "--concurrency", "4", "--warmup", "0"),
        *("--requests-per-level", "4", "--client", "own"),
        *("--timeout-s", "1", "--isl", "64", "--osl", "500"),
    )
    assert failing.popen.returncode == 1, failing.output
    assert "INVALID: more than 1 % of the requests went wrong" in failing.output
    assert "4 of 4 requests: no whole answer within 1 s" in failing.output


def test_a_verdict_starts_both_compares_them_and_leaves_nothing(bench: Workbench) -> None:
    told = bench.start(
        *("bench", "verdict", "--engine", "sim", "--workers", "2", "--concurrency", "4", *SMALL),
        *("--rounds", "1", "--requests-per-level", "20", "--ttft-ms", "1000"),
        *("--", "--kv-transport", "tcp", "--sim-cost-model", FREE),
    )
    assert told.wait_end(VERDICT_TIMEOUT_S) == 0, told.output
    assert "greedy answers are the same" in told.output
    folder = bench.path / "artifacts_root" / "artifacts_0"
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["outcome"] in ("aggregated", "disaggregated", "no difference")
    assert verdict["same_text"] is True
    assert verdict["levels"][0]["best"] == "1 prefill + 1 decode"
    assert set(verdict["levels"][0]["goodput"]) == {"2 aggregated", "1 prefill + 1 decode"}
    assert any("on the workers" in reason for reason in verdict["levels"][0]["reasons"])
    records = list(Path(folder).glob("*/round*/concurrency4/requests.jsonl"))
    assert len(records) == 4
    bench.wait_empty()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_verdict_that_is_ended_ends_what_it_started(
    bench: Workbench, number: signal.Signals, code: int
) -> None:
    told = bench.start("bench", "verdict", "--engine", "sim", *SMALL)
    told.wait_line(r"^http://\S+: demo, aggregated: 2 aggregated workers")
    told.signal(number)
    assert told.wait_end() == code
    bench.wait_empty()


def test_a_verdict_whose_deployment_does_not_start_says_why(bench: Workbench) -> None:
    told = bench.run("bench", "verdict", "--engine", "sim", *SMALL, "--", "--set", "max_seq_len=1")
    assert told.popen.returncode == 3
    assert "the deployment did not get ready" in told.output
    assert "max_seq_len" in told.output
    bench.wait_empty()

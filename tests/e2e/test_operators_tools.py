"""The operator's tools on real runs: compare ranks, pack a failure, tell runs apart, clear what was left."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import tarfile
from pathlib import Path

import pytest

from tests.e2e.harness import SIM_COSTS, Process, Workbench
from trtllm_workers.deploy import proc
from trtllm_workers.deploy.inventory import mpiexec_path
from trtllm_workers.deploy.run import RunFolder, RunRecord

SIM = ("--engine", "sim", "--sim-cost-model", str(SIM_COSTS / "10ms.yaml"))
SECRET = "hf_PlantedSecretOfThisTest00"
needs_mpi = pytest.mark.skipif(
    not mpiexec_path() or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpi4py and mpich",
)


def run_id_of(run: Process) -> str:
    return run.wait_line(r"^run (\w+): ").group(1)


def record_of(bench: Workbench, run_id: str) -> RunRecord:
    record = RunFolder(bench.run_dir / run_id).read()
    assert record is not None
    return record


def ended(run: Process) -> None:
    run.signal(signal.SIGINT)
    assert run.wait_end() == 130


def papers(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        files = {one.name.partition("/")[2]: archive.extractfile(one) for one in archive}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


@needs_mpi
@pytest.mark.timeout(120)
def test_ranks_of_a_run_are_compared_with_the_libraries_they_have_loaded(bench: Workbench) -> None:
    run, _ = bench.up("--engine", "torch", "--set", "tensor_parallel_size=2", UCX_TLS="tcp")
    audited = bench.run("env-audit", "--json")
    assert audited.popen.returncode == 0, audited.output
    found = json.loads(audited.output)
    assert found["who"] == ["ingress", "worker-0 rank 0", "worker-0 rank 1"]
    assert found["same"]["environment"]["UCX_TLS"] == "tcp"
    assert "libmpi" in found["same"]["libraries"]
    assert "UCX_TLS=tcp" in [flag["name"] for flag in found["flags"]]
    ended(run)
    # What the ranks saw is still known, and the same command shows it.
    again = bench.run("env-audit", run_id_of(run))
    assert again.popen.returncode == 0, again.output
    assert "worker-0 rank 1" in again.output


def test_parts_with_different_variables_are_marked_with_exit_code_1(bench: Workbench) -> None:
    first, _ = bench.up(*SIM, NCCL_DEBUG="INFO")
    second, _ = bench.up(*SIM, NCCL_DEBUG="WARN")
    audited = bench.run("env-audit", run_id_of(first), run_id_of(second))
    assert audited.popen.returncode == 1, audited.output
    assert re.search(r"environment: NCCL_DEBUG", audited.output), audited.output
    assert f"{run_id_of(second)}/worker-0" in audited.output
    assert bench.run("env-audit", run_id_of(first)).popen.returncode == 0
    unknown = bench.run("env-audit", "zzzzzz")
    assert unknown.popen.returncode == 2
    assert "unknown run 'zzzzzz'" in unknown.output


def test_a_killed_worker_is_the_first_error_of_a_bundle_without_secrets(bench: Workbench) -> None:
    run, _ = bench.up(
        *SIM, "--max-restarts", "0", HF_TOKEN=SECRET, HTTPS_PROXY=f"http://u:{SECRET}@p:1"
    )
    os.kill(bench.pid_of("worker-0"), signal.SIGKILL)
    assert run.wait_end() == 4
    packed = bench.run("bundle", "-o", "failed.tar.gz")
    assert packed.popen.returncode == 0, packed.output
    assert f"run {run_id_of(run)} (failed)" in packed.output
    inside = papers(bench.path / "failed.tar.gz")
    assert inside["first_error.txt"].startswith("first error: worker-0")
    assert "SIGKILL" in inside["first_error.txt"]
    assert "registered" in inside["logs/worker-0.log"]
    told = json.loads(inside["facts/worker-0.json"])
    assert told["environment"]["HF_TOKEN"] == "[redacted]"
    assert json.loads(inside["resolved.json"])["settings"]["engine"] == {
        "value": "sim",
        "source": "--engine",
    }
    assert not [name for name, text in inside.items() if SECRET in text]
    # Nor is it in what stays on this host.
    assert not [
        path
        for path in bench.run_dir.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]


def test_a_live_run_can_be_bundled_too(bench: Workbench) -> None:
    run, _ = bench.up(*SIM)
    packed = bench.run("bundle")
    assert packed.popen.returncode == 0, packed.output
    inside = papers(bench.path / f"trtllm-launch-{run_id_of(run)}.tar.gz")
    assert inside["first_error.txt"].startswith("no process died")
    secret = (bench.run_dir / run_id_of(run) / "discovery" / "secret").read_text().strip()
    assert not [name for name, text in inside.items() if secret in text]


def test_two_runs_differ_in_what_was_changed_and_in_nothing_else(bench: Workbench) -> None:
    names: list[str] = []
    for words, variables in (((), {}), ((), {}), (("--max-restarts", "1"), {"UCX_TLS": "tcp"})):
        run, _ = bench.up(*SIM, *words, **variables)
        ended(run)
        names.append(run_id_of(run))
    same = bench.run("diff", names[0], names[1])
    assert same.popen.returncode == 0, same.output
    assert "nothing changed" in same.output
    other = bench.run("diff", "--json", names[0], names[2])
    assert other.popen.returncode == 1, other.output
    changes = {one["name"]: one for one in json.loads(other.output)["changes"]}
    assert set(changes) == {"max_restarts", "UCX_TLS"}
    assert changes["max_restarts"]["after_source"] == "--max-restarts"
    assert (changes["UCX_TLS"]["before"], changes["UCX_TLS"]["after"]) == ("–", "tcp")


def test_gc_clears_a_run_whose_launcher_and_guard_were_killed(bench: Workbench) -> None:
    live, _ = bench.up(*SIM)
    run, _ = bench.up(*SIM)
    run_id = run_id_of(run)
    record = record_of(bench, run_id)
    assert record.guard is not None
    worker = next(one for one in record.processes if one.name == "worker-0")
    memory = Path("/dev/shm") / f"trtllm_launch_{run_id}_worker-0_test"
    memory.write_text("")
    try:
        # A stopped worker does not see that its launcher is gone: it would stay for ever.
        os.kill(worker.pid, signal.SIGSTOP)
        for pid in (record.guard.pid, record.launcher.pid):
            os.kill(pid, signal.SIGKILL)
        guard = proc.same(record.guard.pid, record.guard.start_ticks)
        assert not proc.wait_gone([guard] if guard else [], 10)
        run.popen.wait(10)
        noticed = bench.run("doctor", "--engine", "sim", "--http-port", "0")
        assert re.search(rf"left-overs +of dead runs \({run_id}\)", noticed.output), noticed.output
        dry = bench.run("gc", "--dry-run")
        assert f"run {run_id}: would end process worker-0 (pid {worker.pid})" in dry.output
        assert proc.same(worker.pid, worker.start_ticks) is not None
        cleared = bench.run("gc")
        assert cleared.popen.returncode == 0, cleared.output
        assert f"run {run_id}: ended process worker-0 (pid {worker.pid})" in cleared.output
        assert f"run {run_id_of(live)}: left alone: it is alive" in cleared.output
        assert proc.same(worker.pid, worker.start_ticks) is None
        assert not memory.exists()
        assert not (bench.run_dir / run_id).exists()
    finally:
        memory.unlink(missing_ok=True)
    assert "worker-0" in bench.run("ps").output  # the live one's
    assert bench.run("diff", run_id, run_id_of(live)).popen.returncode == 0
    assert "no dead run has left anything" in bench.run("gc").output
    ended(live)

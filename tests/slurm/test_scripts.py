"""The scripts of multinode/ as they are copied: sbatch files, and parts started by one's own sruns."""

from __future__ import annotations

import time
from pathlib import Path

from tests.slurm.cluster import MiniCluster
from tests.slurm.driver import CLI, ROOT, completion, get, left_on, started

DEADLINE_S = 60.0


def wait_for_text(path: Path, words: str) -> str:
    deadline = time.monotonic() + DEADLINE_S
    text = ""
    while words not in text:
        assert time.monotonic() < deadline, f"no {words!r} in {path}:\n{text}"
        time.sleep(0.1)  # another process on another host writes it
        text = path.read_text(errors="replace") if path.exists() else ""
    return text


def test_a_job_file_serves_until_it_is_stopped(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    runs, output = tmp_path / "runs", tmp_path / "job.out"
    told = {"ENGINE": "torch", "NUM_WORKERS": "2", "RUN_DIR": str(runs), "HTTP_PORT": "0"}
    words = f"cd {ROOT} && sbatch --nodes=2 --output={output} multinode/aggregated.sbatch"
    done = mini_cluster.run(["bash", "-c", words], environ=told)
    assert done.returncode == 0, done.stderr
    text = wait_for_text(output, "ready after ")
    url = next(line for line in text.splitlines() if line.startswith("ready after ")).rpartition(
        " at "
    )[2]
    assert completion(url.removesuffix("/v1"), "What is a handoff?")
    stopped = mini_cluster.run([str(CLI), "slurm", "stop", "--run-dir", str(runs)], timeout_s=90)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    deadline = time.monotonic() + DEADLINE_S
    while mini_cluster.run(["squeue", "--noheader"]).stdout.strip():
        assert time.monotonic() < deadline
        time.sleep(0.2)  # SLURM ends a job in its own time
    assert left_on(mini_cluster, mini_cluster.nodes) == []


def test_parts_started_by_ones_own_sruns_find_each_other(
    mini_cluster: MiniCluster, tmp_path: Path
) -> None:
    script = tmp_path / "parts.sh"
    step = "srun --overlap --oversubscribe --export=ALL"
    script.write_text(
        "set -eu\n"
        f"{step} --nodes=1 --ntasks=1 --relative=0 multinode/start_frontend_services.sh --http-port 18077 &\n"
        f"DISAGGREGATION_MODE=prefill ENGINE_CONFIG=engine_configs/prefill.yaml "
        f"{step} --nodes=1 --ntasks=1 --relative=0 multinode/start_trtllm_worker.sh --kv-transport tcp &\n"
        f"DISAGGREGATION_MODE=decode ENGINE_CONFIG=engine_configs/decode.yaml "
        f"{step} --nodes=1 --ntasks=1 --relative=1 multinode/start_trtllm_worker.sh --kv-transport tcp &\n"
        "scontrol show hostnames | head -1\n"
        "wait\n"
    )
    told = {
        "MODEL_PATH": str(ROOT / "trtllm_workers/demo/model"),
        "SERVED_MODEL_NAME": "demo",
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    with started(mini_cluster, tmp_path / "runs", "bash", str(script), nodes=2, **told) as driver:
        head = driver.wait_for("sn").split("sn", 1)[1].split()[0]
        url = f"http://10.77.0.1{head}:18077"
        driver.wait_for("listening")
        deadline = time.monotonic() + DEADLINE_S
        while get(f"{url}/ready").get("status") != "ready":
            assert time.monotonic() < deadline, driver.text
            time.sleep(0.1)  # three processes on two hosts, none of which knows when all are ready
        assert completion(url, "What is a handoff?")
    deadline = time.monotonic() + DEADLINE_S
    while mini_cluster.run(["squeue", "--noheader"]).stdout.strip():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    wait_clean = [line for line in left_on(mini_cluster, mini_cluster.nodes) if "python" in line]
    assert wait_clean == []


def test_a_large_model_must_be_named(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    words = ("env", "-u", "ENGINE", "multinode/srun_disaggregated.sh")
    with started(mini_cluster, tmp_path / "runs", *words) as driver:
        assert driver.wait() == 2
        assert "multinode/srun_disaggregated.sh: set MODEL_PATH" in driver.text


def test_a_job_file_submitted_from_elsewhere_says_so(
    mini_cluster: MiniCluster, tmp_path: Path
) -> None:
    output = tmp_path / "job.out"
    words = f"cd {tmp_path} && sbatch --wait --nodes=1 --output={output} {ROOT}/multinode/aggregated.sbatch"
    done = mini_cluster.run(["bash", "-c", words], timeout_s=DEADLINE_S)
    assert done.returncode == 2
    assert "call sbatch in the checkout of trtllm-launch" in output.read_text()

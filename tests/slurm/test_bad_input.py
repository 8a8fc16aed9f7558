"""What goes wrong on clusters is told before or at the step concerned, and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import MiniCluster
from tests.slurm.driver import CLI, ROOT, completion, left_on, started

AGGREGATED = "multinode/srun_aggregated.sh"
FREE = ("--http-port", "0")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def fails(
    cluster: MiniCluster, runs: Path, *words: str, nodes: int = 0, **environ: str
) -> tuple[int, str]:
    """Return the exit code and all that was said by a run that must fail; nothing may be left of it."""
    with started(cluster, runs, *words, nodes=nodes, **environ) as driver:
        code = driver.wait()
        text = driver.text
    assert code != 0, text
    assert "Traceback" not in text
    assert left_on(cluster, cluster.nodes) == []
    found = [path for path in runs.glob("*/*") if path.parent.name != "history"]
    folders = [path for path in found if path.name != "logs"]
    assert folders == []
    assert cluster.run(["squeue", "--noheader"]).stdout.strip() == ""
    return code, text


def test_too_few_nodes(mini_cluster: MiniCluster, runs: Path) -> None:
    code, text = fails(mini_cluster, runs, AGGREGATED, *FREE, nodes=1, NUM_WORKERS="3")
    assert code == 2
    assert "the workers need 3 aggregated × 1 node = 3 nodes, and this allocation has 1" in text
    assert "salloc --nodes=3" in text


def test_a_model_that_one_node_does_not_see(
    mini_cluster: MiniCluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = ROOT / "trtllm_workers/demo/model"
    local = tmp_path / "local model"
    local.mkdir()
    for one in model.iterdir():
        if one.is_file():
            (local / one.name).write_bytes(one.read_bytes())
    # As if the folder lay on the disk of all nodes but one.
    hide = ["mount", "-t", "tmpfs", "none", str(tmp_path)]
    assert mini_cluster.exec("sn2", hide).returncode == 0
    try:
        shared = tmp_path_factory.mktemp("runs")
        words = (AGGREGATED, *FREE, "--num-workers", "2")
        where = {"MODEL_PATH": str(local)}
        with started(mini_cluster, shared, "-w", "sn1,sn2", *words, nodes=2, **where) as driver:
            code, text = driver.wait(), driver.text
    finally:
        mini_cluster.exec("sn2", ["umount", str(tmp_path)])
    assert code == 2, text
    assert f"sn2: MODEL_PATH {local} does not exist there" in text
    assert "sn1:" not in text
    assert left_on(mini_cluster, mini_cluster.nodes) == []


def test_a_run_folder_that_is_not_shared(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    hide = ["mount", "-t", "tmpfs", "none", str(tmp_path)]
    assert mini_cluster.exec("sn1", hide).returncode == 0
    try:
        with started(
            mini_cluster, tmp_path / "runs", "-w", "sn1", AGGREGATED, *FREE, nodes=1
        ) as driver:
            code, text = driver.wait(), driver.text
    finally:
        mini_cluster.exec("sn1", ["umount", str(tmp_path)])
    assert code == 2
    assert "sn1 has not answered the check" in text
    assert "must lie on a file system that all nodes share" in text


def test_an_allocation_that_is_over(mini_cluster: MiniCluster, runs: Path) -> None:
    words = ("env", "SLURM_JOB_ID=4711", "SLURM_JOB_NODELIST=sn1", AGGREGATED, *FREE)
    code, text = fails(mini_cluster, runs, *words)
    assert code == 2
    assert "the allocation is over; make a new one" in text


def test_parallelism_that_does_not_match(mini_cluster: MiniCluster, runs: Path) -> None:
    words = (AGGREGATED, *FREE, "--set", "tensor_parallel_size=3")
    code, text = fails(mini_cluster, runs, *words, NUM_NODES="2")
    assert code == 2
    assert "tensor_parallel_size 3 is 3 ranks, which cannot be spread evenly over 2 nodes" in text


def test_mpi_that_is_not_offered_or_does_not_fit(mini_cluster: MiniCluster, runs: Path) -> None:
    words = (AGGREGATED, *FREE, "--set", "tensor_parallel_size=2")
    code, text = fails(mini_cluster, runs, *words, "--mpi", "pmix_v9", nodes=1)
    assert code == 2
    assert "--mpi pmix_v9: srun offers" in text
    code, text = fails(mini_cluster, runs, *words, "--mpi", "none", nodes=1)
    assert code == 2
    assert "pmi2" in text, "what would do"


def test_a_job_that_slurm_refuses(mini_cluster: MiniCluster, runs: Path) -> None:
    code, text = fails(mini_cluster, runs, AGGREGATED, *FREE, "--partition", "nowhere")
    assert code == 2
    assert "SLURM refuses the job" in text
    assert "invalid partition" in text.casefold()
    code, text = fails(mini_cluster, runs, AGGREGATED, *FREE, "--num-workers", "9")
    assert code == 2
    assert "would never start (PartitionNodeLimit): it asks for more nodes than" in text


def test_a_port_that_is_taken_on_the_head_node(mini_cluster: MiniCluster, runs: Path) -> None:
    with started(
        mini_cluster, runs, "-w", "sn1", AGGREGATED, "--http-port", "18099", nodes=1
    ) as one:
        one.url()
        with started(
            mini_cluster,
            runs,
            "-w",
            "sn1",
            "--oversubscribe",
            "--overcommit",
            "-n",
            "1",
            AGGREGATED,
            "--http-port",
            "18099",
            nodes=1,
        ) as other:
            code = other.wait()
            assert code == 2, other.text
            assert "sn1: port 18099 of 0.0.0.0 cannot be had: Address already in use" in other.text
        assert one.interrupt() == 130


def test_an_image_on_a_cluster_with_containers_is_passed_to_every_step(
    mini_cluster: MiniCluster, runs: Path, tmp_path: Path
) -> None:
    """The stand-in of pyxis takes its options and contains nothing, so the software is the nodes' own."""
    enroot, removed = tmp_path / "bin" / "enroot", tmp_path / "removed"
    enroot.parent.mkdir()
    enroot.write_text(f'#!/bin/sh\nhostname >> {removed}\necho "$@" >> {removed}\n')
    enroot.chmod(0o755)
    path = f"{enroot.parent}:{os.environ['PATH']}"
    image = {
        "PATH": path,
        "IMAGE": "registry/with space:1",
        "IMAGE_PYTHON": str(CLI.with_name("python")),
    }
    with started(mini_cluster, runs, AGGREGATED, *FREE, nodes=1, **image) as driver:
        assert completion(driver.url(), "What is a handoff?")
        job_id = driver.text.split(" in job ", 1)[1].split(":")[0]
        assert driver.interrupt() == 130
    assert f"remove -f pyxis_trtllm-launch-{job_id} " in removed.read_text(), "once the job is done"
    assert left_on(mini_cluster, mini_cluster.nodes) == []


def test_spaces_and_quotes_in_values(mini_cluster: MiniCluster, tmp_path: Path) -> None:
    runs = tmp_path / 'it\'s a "run" folder, $HOME'
    name = 'a model\'s "name", with spaces'
    with started(
        mini_cluster, runs, AGGREGATED, *FREE, SERVED_MODEL_NAME=name, JOB_NAME="my job"
    ) as driver:
        driver.url()
        assert driver.wait() == 0
    done = mini_cluster.run([str(CLI), "slurm", "stop", "--run-dir", str(runs)], timeout_s=90)
    assert done.returncode == 0, done.stderr
    assert left_on(mini_cluster, mini_cluster.nodes) == []


def prolog(folder: Path, condition: str) -> str:
    """Return srun's words for a cluster whose nodes put a variable into every task's environment."""
    script = folder / "prolog.sh"
    script.write_text(f"#!/bin/sh\nif {condition}; then echo export UCX_TLS=tcp; fi\n")
    script.chmod(0o755)
    return f"--task-prolog={script}"


def test_ranks_that_a_node_gives_another_environment_are_refused_by_name(
    mini_cluster: MiniCluster, runs: Path, tmp_path: Path
) -> None:
    words = (AGGREGATED, *FREE, "--set", "tensor_parallel_size=2", "--num-nodes", "2")
    only_rank_1 = {"SRUN_ARGS": prolog(tmp_path, '[ "$SLURM_PROCID" = 1 ]')}
    code, text = fails(mini_cluster, runs, *words, nodes=2, **only_rank_1)
    assert code == 2
    assert "the ranks of worker-0 see different environments" in text
    assert "UCX_TLS: not set on rank 0; 'tcp' on rank 1" in text


def test_what_all_nodes_add_to_the_environment_is_told(
    mini_cluster: MiniCluster, runs: Path, tmp_path: Path
) -> None:
    told = {"SRUN_ARGS": prolog(tmp_path, "true")}
    with started(mini_cluster, runs, AGGREGATED, *FREE, nodes=1, **told) as driver:
        driver.url()
        assert "UCX_TLS=tcp is set by the node; without cuda in it" in driver.text
        assert driver.interrupt() == 130
    # What the operator's shell says wins.
    told["UCX_TLS"] = "all"
    with started(mini_cluster, runs, AGGREGATED, *FREE, nodes=1, **told) as driver:
        driver.url()
        assert "UCX_TLS=tcp of the node is replaced by all" in driver.text
        assert driver.interrupt() == 130

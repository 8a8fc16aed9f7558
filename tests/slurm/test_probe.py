"""Probing, hostlists, addresses and batch scripts, against what a real SLURM makes of them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.slurm.cluster import PARTITION, MiniCluster
from tests.unit.deploy.slurm.test_hostlist import AS_SLURM_READS, AS_SLURM_WRITES
from trtllm_workers.cli.slurm_probe import probe as probe_command
from trtllm_workers.deploy.slurm.addresses import read_answer
from trtllm_workers.deploy.slurm.cluster import (
    Partition,
    Profile,
    cluster_name,
    gpu_flags,
    load,
    node_addresses,
    pick_account,
    pick_mpi,
    probe,
)
from trtllm_workers.deploy.slurm.command import run_command
from trtllm_workers.deploy.slurm.directives import BatchJob, sbatch_text
from trtllm_workers.deploy.slurm.hostlist import compress, expand

AWKWARD = [
    "a#b",
    "a b",
    "it's",
    'say "hi" #1',
    "back\\slash",
    "\\n",
    "$HOME `id` $(id)",
    "ü;&|<>*?",
]


@pytest.fixture
def login(mini_cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> MiniCluster:
    """The cluster, with this process as one on its login node."""
    monkeypatch.setenv("SLURM_CONF", mini_cluster.environ["SLURM_CONF"])
    return mini_cluster


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


async def test_probe_of_a_real_cluster(login: MiniCluster) -> None:
    profile = await probe(run_command)
    assert profile.cluster_name == "mini" == await cluster_name(run_command)
    assert profile.slurm_version[0].isdigit()
    assert {"none", "pmi2", "pmix"} <= set(profile.mpi_types)
    assert profile.partitions == (
        Partition(
            name=PARTITION,
            is_default=True,
            num_nodes=4,
            num_idle_nodes=4,
            gpus_per_node=8,
            cpus_per_node=64,
        ),
    )
    assert (profile.default_account, profile.accounts) == (None, ())
    assert any("sacctmgr" in one for one in profile.notes)  # a cluster without a database
    assert (profile.takes_jobs, profile.required) == (True, ())
    usable = {"--gpus-per-node", "--gres", "--exclusive", "--no-kill", "--no-requeue", "--signal"}
    assert all(profile.usable(name) for name in usable)
    assert profile.usable("--container-image") is True
    _segment_came_with_23_11(profile)
    assert pick_account(profile, None) is None
    assert pick_mpi(profile, None, "openmpi") == "pmix"
    assert gpu_flags(profile, 8) == ("--gpus-per-node=8",)
    assert login.run(["squeue", "--noheader"]).stdout == ""


def _segment_came_with_23_11(profile: Profile) -> None:
    year, month = (int(number) for number in profile.slurm_version.split(".")[:2])
    if (year, month) < (23, 11):
        assert profile.usable("--segment") is False
        assert "unrecognized option '--segment=1'" in profile.accepts["--segment"].text


async def test_probe_for_more_gpus_than_a_node_has_is_refused_by_slurm(login: MiniCluster) -> None:
    profile = await probe(run_command, num_gpus=9)
    verdict = profile.accepts["--gpus-per-node"]
    assert verdict.kind == "refused"
    assert "node configuration is not available" in verdict.text


def test_the_command_shows_and_keeps_the_profile(
    login: MiniCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_DIR", str(tmp_path))
    done = CliRunner().invoke(probe_command, [], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "--gpus-per-node=8" in done.output
    kept = load(tmp_path / "slurm" / "mini.json")
    assert kept is not None
    assert kept.cluster_name == "mini"


@pytest.mark.parametrize(("text", "names"), AS_SLURM_READS)
def test_slurm_reads_hostlists_as_we_do(login: MiniCluster, text: str, names: list[str]) -> None:
    assert login.run(["scontrol", "show", "hostnames", text]).stdout.split() == names
    assert expand(text) == names


@pytest.mark.parametrize(("names", "text"), AS_SLURM_WRITES)
def test_slurm_writes_hostlists_as_we_do(login: MiniCluster, names: list[str], text: str) -> None:
    said = login.run(["scontrol", "show", "hostlist", ",".join(names)]).stdout.strip()
    assert said == text == compress(names)


def test_slurm_reads_a_long_hostlist_of_ours(login: MiniCluster) -> None:
    names = [f"rack{rack}node{node:02}" for rack in (3, 1, 2) for node in (*range(8, 13), 40, 7)]
    names += ["login", *(f"sn{number}" for number in (9, 10, 11, 11, 99, 100))]
    said = login.run(["scontrol", "show", "hostnames", compress(names)]).stdout.split()
    assert said == names


async def test_slurm_tells_the_addresses_of_nodes(login: MiniCluster) -> None:
    assert await node_addresses(run_command, "sn[1,3]") == {
        "sn1": "10.77.0.11",
        "sn3": "10.77.0.13",
    }


@pytest.mark.parametrize("given", [None, "10.77.0.200"])
def test_a_node_hands_its_address_on_in_a_file(
    login: MiniCluster, folder: Path, given: str | None
) -> None:
    path = folder / "head.json"
    words = ["-m", "trtllm_workers.deploy.slurm.addresses", str(path)]
    done = login.run(
        ["srun", "--nodelist=sn2", "--nodes=1", "--ntasks=1", sys.executable, *words],
        environ={"HEAD_NODE_IP": given or ""},
    )
    assert done.returncode == 0, done.stderr
    found = read_answer(path)
    assert found.address == (given or "10.77.0.12")
    assert found.host == "sn2"
    assert found.because == (f"{given} was given" if given else "SLURM knows this node as sn2")


@pytest.mark.parametrize("value", [*AWKWARD, "x" * 1000])
def test_sbatch_reads_values_as_they_were_meant(
    login: MiniCluster, folder: Path, value: str
) -> None:
    job = BatchJob(
        name="awkward", words=("true",), chdir=str(folder), extra=("--hold", f"--comment={value}")
    )
    (folder / "job.sh").write_text(sbatch_text(job))
    submitted = login.run(["sbatch", "--parsable", str(folder / "job.sh")])
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    try:
        shown = login.run(["squeue", "--noheader", "--jobs", job_id, "--Format", "Comment:4000"])
        assert shown.stdout.rstrip("\n").rstrip(" ") == value
    finally:
        login.run(["scancel", job_id])


def test_a_batch_job_runs_its_words_and_they_get_the_signal_to_end(
    login: MiniCluster, folder: Path
) -> None:
    room = folder / "with space # and it's"
    room.mkdir()
    os.mkfifo(room / "started")
    script = "trap 'echo asked to end; exit 0' TERM; echo \"$@\"; : >started; sleep 100 & wait"
    job = BatchJob(
        name="all of it",
        words=("sh", "-c", script, "x", *AWKWARD),
        num_nodes=2,
        gpu_flags=("--gpus-per-node=2",),
        partition=PARTITION,
        time_limit="00:05:00",
        output=f"{room}/%j.out",
        chdir=str(room),
        no_kill=True,
        no_requeue=True,
        signal_before_end_s=50,
        extra=("--exclusive",),
    )
    (folder / "job.sh").write_text(sbatch_text(job))
    submitted = login.run(["sbatch", "--parsable", str(folder / "job.sh")])
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    login.run(["cat", str(room / "started")])  # ends when the job has opened it too
    shown = login.run(["scontrol", "show", "job", job_id]).stdout.split()
    assert {"NumNodes=2", "TimeLimit=00:05:00", "Requeue=0"} <= set(shown)
    assert any(re.fullmatch(r"TresPerNode=gres[:/]gpu:2", one) for one in shown)
    # As --signal=B: has it sent, which would take SLURM up to a minute.
    login.run(["scancel", "--batch", "--signal=TERM", job_id])
    login.run(["srun", f"--dependency=afterany:{job_id}", "true"])
    printed = (room / f"{job_id}.out").read_text()
    words = login.run(["sh", "-c", f'set -- {shlex.join(AWKWARD)}; echo "$@"']).stdout
    assert printed.startswith(words)
    assert printed.endswith("asked to end\n")
    assert "JobState=COMPLETED" in login.run(["scontrol", "show", "job", job_id]).stdout

"""What a probe finds on clusters of several kinds, and what follows for jobs."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.deploy.slurm.fake_slurm import (
    BANNER,
    NO_ACCOUNT,
    NO_DATABASE,
    NO_GRES,
    NO_OPTION,
    OLD_MPI_TYPES,
    PYXIS_HELP,
    FakeCluster,
)
from trtllm_workers.deploy.slurm import answers
from trtllm_workers.deploy.slurm.cluster import (
    Partition,
    Profile,
    Verdict,
    age,
    load,
    probe,
    profile_path,
    save,
)
from trtllm_workers.deploy.slurm.command import Answer, run_command
from trtllm_workers.errors import ConfigError, StartError

GPU = Partition(
    name="gpu",
    is_default=True,
    state="up",
    num_nodes=10,
    num_idle_nodes=7,
    max_time_s=172_800.0,
    gpus_per_node=8,
    gpu_type="h100",
    cpus_per_node=128,
)
CPU = Partition(name="cpu", num_nodes=40, num_idle_nodes=40, cpus_per_node=64)


async def test_probe_reads_what_the_cluster_offers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster(help=PYXIS_HELP).install(tmp_path, monkeypatch)
    profile = await probe(run_command)
    assert profile.cluster_name == "hpc"
    assert profile.slurm_version == "23.11.10"
    assert profile.mpi_types == ("none", "cray_shasta", "pmi2", "pmix", "pmix_v4", "pmix_v5")
    assert profile.partitions == (GPU, CPU)
    assert (profile.default_account, profile.accounts) == ("astro", ("astro",))
    assert profile.accepts["--container-image"] == Verdict("accepted")
    assert (profile.required, profile.notes) == ((), ())
    assert abs(time.time() - profile.probed_at_s) < 60


async def test_probe_only_ever_tests_and_never_submits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = FakeCluster(wants={"--account=": NO_ACCOUNT}).install(tmp_path, monkeypatch)
    await probe(run_command)
    lines = calls.read_text().splitlines()
    assert len(lines) > 10
    assert all(line.split()[0] == "--test-only" for line in lines)


async def test_probe_reads_the_same_between_banners_and_messages_of_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster(banner=BANNER, help=PYXIS_HELP).install(tmp_path, monkeypatch)
    profile = await probe(run_command)
    assert profile.partitions == (GPU, CPU)
    assert profile.mpi_types[:2] == ("none", "cray_shasta")
    assert (profile.cluster_name, profile.accounts) == ("hpc", ("astro",))


async def test_probe_reads_the_mpi_types_of_versions_that_print_them_to_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster(mpi_stdout="", mpi_stderr=OLD_MPI_TYPES).install(tmp_path, monkeypatch)
    profile = await probe(run_command)
    assert profile.mpi_types == ("cray_shasta", "none", "pmi2", "pmix_v3", "pmix")


async def test_probe_without_a_database_knows_no_accounts_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster(sacctmgr_complaint=NO_DATABASE).install(tmp_path, monkeypatch)
    profile = await probe(run_command)
    assert (profile.default_account, profile.accounts) == (None, ())
    assert "accounting_storage/slurmdbd" in profile.notes[0]
    assert "--account" not in profile.accepts  # there was no name to try it with


async def test_probe_without_sacctmgr_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster(has_sacctmgr=False).install(tmp_path, monkeypatch)
    assert "sacctmgr: No such file" in (await probe(run_command)).notes[0]


async def test_probe_counts_only_accounts_of_this_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCluster(default_account="elsewhere", other_cluster="old")
    fake.install(tmp_path, monkeypatch)
    profile = await probe(run_command)
    assert (profile.default_account, profile.accounts) == (None, ("astro",))


async def test_probe_tells_which_directives_are_refused_and_in_what_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = {"--gpus-per-node=": NO_GRES, "--segment=": NO_OPTION}
    FakeCluster(refuses=refuses).install(tmp_path, monkeypatch)
    accepts = (await probe(run_command)).accepts
    assert accepts["--gpus-per-node"] == Verdict("refused", NO_GRES)
    assert accepts["--segment"].text.startswith("sbatch: unrecognized option '--segment=1'; Try")
    assert accepts["--gres"] == Verdict("accepted")
    assert not accepts["--container-image"].is_usable
    taken = {"--exclusive", "--mem", "--no-kill", "--no-requeue", "--signal", "--comment"}
    assert all(accepts[name].is_usable for name in taken)


@pytest.mark.parametrize(
    ("wants", "required"),
    [
        ({"--account=": NO_ACCOUNT}, ("--account=astro",)),
        ({"--time=": "sbatch: error: time limit needed"}, ("--time=00:10:00",)),
        ({"--gres=": "GPUs needed"}, ("--gres=gpu:8",)),
        ({"--exclusive": "whole nodes only"}, ("--exclusive",)),
        (
            {"--account=": NO_ACCOUNT, "--gpus-per-node=": "GPUs needed"},
            ("--account=astro", "--gpus-per-node=8"),
        ),
        (
            {"--account=": "a", "--time=": "b", "--partition=": "c", "--exclusive": "d"},
            ("--account=astro", "--time=00:10:00", "--partition=gpu", "--exclusive"),
        ),
    ],
)
async def test_probe_finds_the_fewest_flags_that_a_cluster_requires(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wants: dict[str, str],
    required: tuple[str, ...],
) -> None:
    FakeCluster(wants=wants).install(tmp_path, monkeypatch)
    profile = await probe(run_command)
    assert profile.required == required
    kinds = {flag.partition("=")[0] for flag in required}
    assert {name for name, one in profile.accepts.items() if one.kind == "required"} == kinds
    assert profile.accepts["--no-kill"].kind == "accepted"


async def test_probe_tries_each_account_when_one_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCluster(
        accounts=("closed", "open"), default_account="", wants={"--account=open": NO_ACCOUNT}
    )
    fake.install(tmp_path, monkeypatch)
    assert (await probe(run_command)).required == ("--account=open",)


async def test_probe_of_a_cluster_that_takes_no_job_says_what_sbatch_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster(wants={"--never": "sbatch: error: maintenance"}).install(tmp_path, monkeypatch)
    profile = await probe(run_command)
    assert not profile.takes_jobs
    assert profile.accepts == {}
    assert "not even a plain job of one node" in profile.notes[0]
    assert "maintenance" in profile.notes[0]


async def test_probe_names_the_partition_and_account_that_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = FakeCluster().install(tmp_path, monkeypatch)
    profile = await probe(run_command, partition="cpu", account="geo", num_gpus=2)
    assert profile.partition == "cpu"
    lines = calls.read_text().splitlines()
    assert all("--partition=cpu" in line and "--account=geo" in line for line in lines)
    assert any("--gpus-per-node=2" in line for line in lines)


async def test_probe_tests_a_partition_with_gpus_when_the_default_one_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "@trtllm@cpu|cpu*|up|0/4/0/4|1:00:00|(null)|8\n@trtllm@gpu|gpu|up|0/4/0/4|30|gpu:4|8"
    FakeCluster(partitions=rows).install(tmp_path, monkeypatch)
    assert (await probe(run_command)).partition == "gpu"


async def test_probe_of_an_unknown_partition_names_those_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster().install(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="--partition nix: there are gpu, cpu"):
        await probe(run_command, partition="nix")


async def test_probe_where_there_is_no_slurm_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no SLURM on this host: sinfo: No such file"):
        await probe(run_command)


async def test_probe_shows_the_words_of_a_sinfo_that_fails() -> None:
    async def fails(argv: object, *, timeout_s: float = 0) -> Answer:
        return Answer(1, stderr="slurm_load_partitions: Unable to contact slurm controller")

    with pytest.raises(StartError, match=r"sinfo .* failed: .*Unable to contact"):
        await probe(fails)


async def test_refusals_do_not_count_when_the_controller_goes_away_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster().install(tmp_path, monkeypatch)
    num_tests = 0

    async def leaves(argv: list[str], *, timeout_s: float = 20) -> Answer:
        nonlocal num_tests
        num_tests += argv[0] == "sbatch"
        if argv[0] == "sbatch" and num_tests > 3:
            return Answer(1, stderr="Unable to contact slurm controller")
        return await run_command(argv, timeout_s=timeout_s)

    profile = await probe(leaves)  # type: ignore[arg-type]  # its argv is always a list or tuple
    assert set(profile.accepts) == {"--gpus-per-node", "--gres"}
    assert "probe again" in profile.notes[-1]


async def test_trials_end_when_the_controller_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster().install(tmp_path, monkeypatch)
    tests: list[object] = []

    async def hangs(argv: list[str], *, timeout_s: float = 20) -> Answer:
        if argv[0] != "sbatch":
            return await run_command(argv, timeout_s=timeout_s)
        tests.append(argv)
        return Answer(124, stderr="sbatch: no answer within 20 s")

    profile = await probe(hangs)  # type: ignore[arg-type]  # its argv is always a list or tuple
    assert len(tests) == 1
    assert profile.accepts == {}
    assert "ended early: sbatch: no answer within 20 s" in profile.notes[0]


async def test_a_command_past_its_deadline_is_killed_with_its_children(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! >{tmp_path}/pid; echo half; wait"
    started_s = time.monotonic()
    answer = await run_command(["sh", "-c", script], timeout_s=0.5)
    assert time.monotonic() - started_s < 10
    assert answer.is_late
    assert answer.complaint == "sh: no answer within 0.5 s"
    await _wait_gone(int((tmp_path / "pid").read_text()))


async def test_a_cancelled_command_is_killed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")
    script = f"echo $$ >{tmp_path}/pid; exec sleep 300"
    running = asyncio.create_task(run_command(["sh", "-c", script]))
    pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await _wait_gone(pid)


async def _wait_gone(pid: int) -> None:
    """Wait until a process has ended, buried or not."""
    try:
        ended = os.pidfd_open(pid)  # readable once it has
    except ProcessLookupError:
        return
    try:
        loop = asyncio.get_running_loop()
        seen = asyncio.Event()
        loop.add_reader(ended, seen.set)
        async with asyncio.timeout(10):
            await seen.wait()
        loop.remove_reader(ended)
    finally:
        os.close(ended)


@pytest.mark.parametrize(
    ("gres", "gpus", "kind"),
    [
        ("gpu:8", 8, ""),
        ("gpu:h100:8(S:0-1)", 8, "h100"),
        ("gpu:a100:4,nvme:1", 4, "a100"),
        ("gpu:h100:4(S:0,1),gpu:a100:2(S:0-1)", 6, "h100"),
        ("gpu:no_consume:4", 4, ""),
        ("gpu", 1, ""),
        ("shard:16", 0, ""),
        ("(null)", 0, ""),
    ],
)
def test_gpus_are_counted_from_a_nodes_gres(gres: str, gpus: int, kind: str) -> None:
    (found,) = answers.partitions(f"@trtllm@p|p|up|0/1/0/1|infinite|{gres}|8")
    assert (found.gpus_per_node, found.gpu_type) == (gpus, kind)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("infinite", None),
        ("n/a", None),
        ("30", 1800.0),
        ("2:30", 150.0),
        ("1:00:00", 3600.0),
        ("2-00:00:00", 172_800.0),
        ("7-12", 648_000.0),
    ],
)
def test_times_of_slurm_are_read(text: str, expected: float | None) -> None:
    assert answers.seconds(text) == expected


def test_a_profile_is_kept_and_found_again(tmp_path: Path) -> None:
    path = profile_path(tmp_path, "hpc")
    profile = Profile(
        cluster_name="hpc",
        slurm_version="23.11.10",
        mpi_types=("pmix",),
        partitions=(GPU, CPU),
        accounts=("astro",),
        accepts={"--gres": Verdict("refused", "no"), "--time": Verdict("required")},
        required=("--time=00:10:00",),
        notes=("a note",),
        probed_at_s=1_700_000_000.5,
    )
    save(replace(profile, notes=()), path)
    save(profile, path)
    assert path == tmp_path / "slurm" / "hpc.json"
    assert load(path) == profile
    assert list(path.parent.iterdir()) == [path]


def test_a_clusters_name_is_no_way_out_of_the_folder(tmp_path: Path) -> None:
    assert profile_path(tmp_path, "../../etc/x").parent == tmp_path / "slurm"


def test_a_profile_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert load(tmp_path / "hpc.json") is None


@pytest.mark.parametrize("text", ["", '{"cluster_name": "hp', '{"cluster_name": 3}', "[]"])
def test_a_spoilt_profile_is_named_and_ignored(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hpc.json"
    path.write_text(text)
    said: list[str] = []
    assert load(path, said.append) is None
    assert str(path) in said[0]
    assert "slurm probe" in said[0]


@pytest.mark.parametrize(
    ("past_s", "words"), [(-5, "0.0 s ago"), (60, "1 min 0 s ago"), (90_000, "1 d 1 h ago")]
)
def test_the_age_of_a_profile_is_told(past_s: float, words: str) -> None:
    profile = Profile(cluster_name="hpc", slurm_version="23", probed_at_s=1e9)
    assert age(profile, 1e9 + past_s) == words


def test_a_profile_that_cannot_be_kept_is_an_error_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "slurm").touch()
    with pytest.raises(ConfigError, match=r"slurm/hpc\.json: .* --no-save"):
        save(Profile(cluster_name="hpc", slurm_version="23"), tmp_path / "slurm" / "hpc.json")

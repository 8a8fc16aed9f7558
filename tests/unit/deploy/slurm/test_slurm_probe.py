"""``slurm probe`` as people and programs see it, on clusters of several kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.unit.deploy.slurm.fake_slurm import (
    NO_ACCOUNT,
    NO_DATABASE,
    NO_GRES,
    NO_OPTION,
    PYXIS_HELP,
    FakeCluster,
)
from trtllm_workers.cli.slurm_probe import probe
from trtllm_workers.deploy.slurm.cluster import load
from trtllm_workers.errors import ConfigError


def run(fake: FakeCluster, folder: Path, patch: pytest.MonkeyPatch, *words: str) -> Result:
    fake.install(folder, patch)
    patch.setenv("RUN_DIR", str(folder / "state"))
    return CliRunner().invoke(probe, list(words), standalone_mode=False)


def without_times(text: str, folder: Path) -> str:
    text = re.sub(r"probed \S+ s ago", "probed 0.1 s ago", text)
    return text.replace(str(folder), "/home/me")


@pytest.mark.parametrize(
    ("name", "fake"),
    [
        ("friendly", FakeCluster(help=PYXIS_HELP)),
        (
            "peculiar",
            FakeCluster(
                accounts=("astro", "geo"),
                default_account="",
                mpi_stdout="MPI plugin types are...\n\tnone\n\tpmi2",
                refuses={"--gpus-per-node=": NO_GRES, "--segment=": NO_OPTION},
                wants={
                    "--account=": NO_ACCOUNT,
                    "--time=": "allocation failure: no time limit",
                    "--exclusive": "sbatch: error: whole nodes only",
                },
            ),
        ),
        (
            "plain",
            FakeCluster(
                partitions="@trtllm@all|all*|up|0/3/1/4|infinite|(null)|64",
                sacctmgr_complaint=NO_DATABASE,
                refuses={"--gpus-per-node=": NO_GRES, "--gres=": NO_GRES},
            ),
        ),
    ],
)
def test_probe_shows_what_is_offered_what_follows_and_what_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    golden: Callable[[str, str], None],
    name: str,
    fake: FakeCluster,
) -> None:
    done = run(fake, tmp_path, monkeypatch)
    assert done.return_value == 0
    golden(f"slurm_probe_{name}.txt", without_times(done.output, tmp_path))


def test_probe_keeps_what_it_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(FakeCluster(), tmp_path, monkeypatch)
    kept = load(tmp_path / "state" / "slurm" / "hpc.json")
    assert kept is not None
    assert kept.accounts == ("astro",)


def test_probe_prints_json_alone_and_keeps_nothing_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(FakeCluster(), tmp_path, monkeypatch, "--json", "--no-save", "--gpus", "4")
    found = json.loads(done.stdout)
    assert found["cluster_name"] == "hpc"
    assert found["accepts"]["--gres"] == {"kind": "accepted", "text": ""}
    assert not (tmp_path / "state").exists()


def test_a_cluster_that_takes_no_job_ends_with_2_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCluster(wants={"--never": "sbatch: error: maintenance"}, help=PYXIS_HELP)
    done = run(fake, tmp_path, monkeypatch)
    assert done.return_value == 2
    assert "maintenance; try --partition, --account or --gpus" in done.output
    assert not (tmp_path / "state").exists()


def test_an_unknown_partition_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(FakeCluster(), tmp_path, monkeypatch, "--partition", "nix")
    assert isinstance(done.exception, ConfigError)
    assert "there are gpu, cpu" in str(done.exception)

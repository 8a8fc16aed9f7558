"""srun's words, mounts, and the variables that must not reach srun."""

from __future__ import annotations

import shlex

import pytest

from trtllm_workers.deploy.slurm.steps import (
    Container,
    Step,
    mounts_of,
    split_words,
    srun_words,
    unset_for_srun,
)
from trtllm_workers.errors import ConfigError

COMMAND = ("python", "-m", "task", "a folder with 'quotes'")


def test_a_world_over_two_nodes() -> None:
    words = srun_words(Step("decode-0", ("n1", "n2"), 4, "pmix"), COMMAND, run_id="abc123")
    assert words[0] == "srun"
    assert {
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--nodelist=n1,n2",
        "--mpi=pmix",
        "--label",
        "--overlap",
        "--kill-on-bad-exit=1",
    } <= set(words)
    assert words[-4:] == COMMAND
    assert not [word for word in words if word.startswith("--container")]


def test_one_task_is_not_labelled() -> None:
    assert "--label" not in srun_words(Step("ingress", ("n1",)), COMMAND, run_id="abc123")


def test_an_image_is_unpacked_once_and_then_entered() -> None:
    container = Container("nvcr.io#nvidia/x:1", ("/a b:/mnt",), "trtllm-launch-7")
    first = srun_words(
        Step("preflight", ("n1",)), COMMAND, run_id="r", container=container, first=True
    )
    later = srun_words(Step("ingress", ("n1",)), COMMAND, run_id="r", container=container)
    assert "--container-image=nvcr.io#nvidia/x:1" in first
    assert "--container-name=trtllm-launch-7" in first
    assert "--container-mounts=/a b:/mnt" in later
    assert "--container-name=trtllm-launch-7" in later
    assert not [word for word in later if word.startswith("--container-image")]


def test_words_of_the_operator_stand_before_the_command() -> None:
    more = split_words("--gres=gpu:4 --comment='two words'", "--srun-args")
    words = srun_words(Step("x", ("n1",)), COMMAND, run_id="r", more=more)
    assert words[-6:-4] == ("--gres=gpu:4", "--comment=two words")
    assert shlex.split(shlex.join(words)) == list(words)
    with pytest.raises(ConfigError, match="--srun-args"):
        split_words("'open", "--srun-args")


def test_mounts_get_what_the_run_needs_besides() -> None:
    found = mounts_of(
        "/repo:/mnt,/models:/models", ["/models/llama", "/home/me/runs", "/home/me/runs"]
    )
    assert found == ("/repo:/mnt", "/models:/models", "/home/me/runs:/home/me/runs")


def test_a_folder_mounted_elsewhere_does_not_cover_it() -> None:
    assert mounts_of("/models:/data", ["/models/x"]) == ("/models:/data", "/models/x:/models/x")


@pytest.mark.parametrize("text", ["repo:/mnt", "/repo", "/a:/b:ro:more", ":/x"])
def test_what_is_no_mount_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="is no mount"):
        mounts_of(text, [])


@pytest.mark.parametrize("path", ["/a,b", "/a:b"])
def test_paths_that_pyxis_cannot_take_are_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="comma or a colon"):
        mounts_of("", [path])


def test_variables_of_another_step_do_not_reach_srun() -> None:
    environ = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CONF": "/x",
        "SLURM_NTASKS": "9",
        "SLURM_STEP_ID": "0",
        "SLURM_MEM_PER_CPU": "1",
        "SBATCH_EXPORT": "NONE",
        "PMI_RANK": "0",
        "PMIX_RANK": "0",
        "OMPI_MCA_btl": "tcp",
        "HOME": "/root",
    }
    assert unset_for_srun(environ) == {
        "SLURM_NTASKS",
        "SLURM_STEP_ID",
        "SLURM_MEM_PER_CPU",
        "SBATCH_EXPORT",
        "PMI_RANK",
        "PMIX_RANK",
    }

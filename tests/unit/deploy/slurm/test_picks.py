"""Which account, MPI and flags for GPUs a job gets from a profile."""

from __future__ import annotations

import pytest

from trtllm_workers.deploy.slurm.cluster import (
    Profile,
    Verdict,
    gpu_flags,
    pick_account,
    pick_mpi,
)
from trtllm_workers.deploy.slurm.picks import MpiNeeds
from trtllm_workers.errors import ConfigError

OFFERED = ("none", "cray_shasta", "pmi2", "pmix", "pmix_v4")


def a_profile(**facts: object) -> Profile:
    return Profile(cluster_name="hpc", slurm_version="23.11", **facts)  # type: ignore[arg-type]  # facts of a Profile


@pytest.mark.parametrize(
    ("profile", "asked", "expected"),
    [
        (a_profile(), None, None),
        (a_profile(), "astro", "astro"),
        (a_profile(accounts=("astro",)), None, "astro"),
        (a_profile(accounts=("astro", "geo"), default_account="geo"), None, "geo"),
        (a_profile(accounts=("astro", "geo"), default_account="geo"), "astro", "astro"),
    ],
)
def test_the_account_is_the_asked_one_or_the_default_one(
    profile: Profile, asked: str | None, expected: str | None
) -> None:
    assert pick_account(profile, asked) == expected


@pytest.mark.parametrize(
    ("profile", "asked", "words"),
    [
        (a_profile(accounts=("astro", "geo")), None, "several accounts .* astro, geo; .*--account"),
        (a_profile(accounts=("astro", "geo")), "astr", "did you mean astro.* astro, geo"),
        (a_profile(accepts={"--account": Verdict("required")}), None, "wants an account"),
    ],
)
def test_an_account_that_is_not_clear_is_an_error_that_names_them(
    profile: Profile, asked: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pick_account(profile, asked)


@pytest.mark.parametrize(
    ("offered", "asked", "needs", "expected"),
    [
        (OFFERED, None, "openmpi", "pmix"),
        (OFFERED, "pmix_v4", "openmpi", "pmix_v4"),
        (("none", "pmix_v3", "pmix_v10", "pmix_v4"), None, "openmpi", "pmix_v10"),
        (OFFERED, None, "mpich", "pmi2"),
        (("none", "pmix"), None, "mpich", "pmix"),
        (OFFERED, "pmix", "mpich", "pmix"),
        (OFFERED, None, "", "none"),
        ((), "none", "", "none"),
        (OFFERED, "pmi2", "", "pmi2"),
    ],
)
def test_the_mpi_type_fits_the_workers_mpi(
    offered: tuple[str, ...], asked: str | None, needs: MpiNeeds, expected: str
) -> None:
    assert pick_mpi(offered, asked, needs) == expected
    assert pick_mpi(a_profile(mpi_types=offered), asked, needs) == expected


@pytest.mark.parametrize(
    ("offered", "asked", "needs", "words"),
    [
        (OFFERED, "pmi1", "", "--mpi pmi1: srun offers none, cray_shasta, pmi2, pmix, pmix_v4"),
        (OFFERED, "none", "openmpi", "--mpi none: ranks of Open MPI .* needs pmix,"),
        (OFFERED, "none", "mpich", "needs pmi2 or pmix"),
        (OFFERED, "pmi2", "openmpi", "would not find each other"),
        (("none", "pmi2"), None, "openmpi", "need srun --mpi=pmix, and srun offers none, pmi2"),
        ((), None, "mpich", "srun offers nothing"),
    ],
)
def test_an_mpi_type_that_would_start_separate_worlds_is_refused(
    offered: tuple[str, ...], asked: str | None, needs: MpiNeeds, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pick_mpi(offered, asked, needs)


NO = Verdict("refused", "no")
YES = Verdict("accepted")


@pytest.mark.parametrize(
    ("accepts", "gpus", "flags"),
    [
        ({}, 8, ("--gpus-per-node=8",)),
        ({"--gpus-per-node": YES, "--gres": YES}, 8, ("--gpus-per-node=8",)),
        ({"--gpus-per-node": NO, "--gres": YES}, 4, ("--gres=gpu:4",)),
        ({"--gpus-per-node": NO, "--gres": Verdict("required")}, 4, ("--gres=gpu:4",)),
        ({"--gpus-per-node": NO, "--gres": NO}, 4, ()),
        ({"--gpus-per-node": YES}, 0, ()),
    ],
)
def test_gpus_are_asked_for_in_the_way_that_the_cluster_takes(
    accepts: dict[str, Verdict], gpus: int, flags: tuple[str, ...]
) -> None:
    assert gpu_flags(a_profile(accepts=accepts), gpus) == flags

"""What a job on this cluster is given: account, way of starting MPI, flags for GPUs. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

from trtllm_workers.config.spelling import nearest
from trtllm_workers.deploy.slurm.profile import Profile
from trtllm_workers.errors import ConfigError

MpiNeeds = Literal["openmpi", "mpich", ""]

_FITTING: Final = {"openmpi": ("pmix",), "mpich": ("pmi2", "pmix")}
_CALLED: Final = {"openmpi": "Open MPI", "mpich": "MPICH"}


def pick_account(profile: Profile, asked: str | None) -> str | None:
    """Return the account a job runs under; None leaves it to SLURM.

    Raises ConfigError when there are several and nothing says which, when ``asked`` is none of the
    user's, and when the cluster wants one and none is known.
    """
    names = ", ".join(profile.accounts)
    if asked:
        if profile.accounts and asked not in profile.accounts:
            near = nearest(asked, profile.accounts)
            hint = f"did you mean {near}? " if near else ""
            raise ConfigError(
                f"--account {asked}: {hint}your accounts on {profile.cluster_name}: {names}",
                param="account",
            )
        return asked
    if profile.default_account:
        return profile.default_account
    if len(profile.accounts) == 1:
        return profile.accounts[0]
    if profile.accounts:
        raise ConfigError(
            f"you have several accounts on {profile.cluster_name}, and no default one: {names}; "
            "say which with --account",
            param="account",
        )
    verdict = profile.accepts.get("--account")
    if verdict is not None and verdict.kind == "required":
        raise ConfigError(
            f"{profile.cluster_name} wants an account for every job; say which with --account",
            param="account",
        )
    return None


def pick_mpi(profile_or_types: Profile | Sequence[str], asked: str | None, needs: MpiNeeds) -> str:
    """Return the value of ``srun --mpi`` for workers whose MPI is ``needs``.

    Open MPI needs pmix, MPICH takes pmi2 or pmix. With another one each rank starts as a world of its
    own and no error is shown, so that is refused here. ``needs`` is "" when every worker has one rank,
    and only then may the answer be ``none``.
    """
    offered = (
        profile_or_types.mpi_types
        if isinstance(profile_or_types, Profile)
        else tuple(profile_or_types)
    )
    listed = ", ".join(offered) or "nothing"
    if asked and asked != "none" and asked not in offered:
        raise ConfigError(f"--mpi {asked}: srun offers {listed} here", param="mpi")
    if not needs:
        return asked or "none"
    fitting = [one for kind in _FITTING[needs] for one in _of_kind(offered, kind)]
    wanted = " or ".join(_FITTING[needs])
    if asked:
        if asked not in fitting:
            raise ConfigError(
                f"--mpi {asked}: ranks of {_CALLED[needs]} would not find each other; "
                f"it needs {wanted}, and srun offers {listed} here",
                param="mpi",
            )
        return asked
    if not fitting:
        raise ConfigError(
            f"workers of several ranks with {_CALLED[needs]} need srun --mpi={wanted}, and srun offers "
            f"{listed} here; ask the cluster's people for it, or plan workers of one rank",
            param="mpi",
        )
    return fitting[0]


def gpu_flags(profile: Profile, gpus: int) -> tuple[str, ...]:
    """Return the flags that ask for ``gpus`` GPUs on each node.

    Empty for none, and where the cluster takes neither way of asking: there a node comes with all it has.
    """
    if gpus <= 0:
        return ()
    if profile.usable("--gpus-per-node") is not False:
        return (f"--gpus-per-node={gpus}",)
    if profile.usable("--gres") is not False:
        return (f"--gres=gpu:{gpus}",)
    return ()


def _of_kind(offered: Sequence[str], kind: str) -> list[str]:
    """Return what is offered of a kind: the plain name first, then the newest version."""
    versions = [one for one in offered if re.fullmatch(rf"{kind}_v\d+", one)]
    newest_first = sorted(versions, key=lambda one: int(one.rpartition("v")[2]), reverse=True)
    return [one for one in (kind,) if one in offered] + newest_first

"""Asks a SLURM cluster what it offers, and gives the rest of ``Profile``'s parts their one door."""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Sequence
from typing import Final

from trtllm_workers.deploy.slurm import answers
from trtllm_workers.deploy.slurm.command import Answer, RunCommand
from trtllm_workers.deploy.slurm.picks import gpu_flags, pick_account, pick_mpi
from trtllm_workers.deploy.slurm.profile import (
    ACCEPTED,
    Partition,
    Profile,
    Verdict,
    age,
    load,
    profile_path,
    save,
)
from trtllm_workers.deploy.slurm.trials import Wanted, directive_of, try_directives
from trtllm_workers.errors import ConfigError, StartError

__all__ = [
    "Partition",
    "Profile",
    "Verdict",
    "age",
    "cluster_name",
    "gpu_flags",
    "load",
    "node_addresses",
    "pick_account",
    "pick_mpi",
    "probe",
    "profile_path",
    "save",
]

_CONTAINER: Final = re.compile(r"^\s*--container-image\b", re.MULTILINE)


async def probe(
    run_command: RunCommand,
    *,
    partition: str | None = None,
    account: str | None = None,
    num_gpus: int | None = None,
) -> Profile:
    """Return what the cluster offers this user: in ``partition``, under ``account``, ``num_gpus`` a node.

    Asks only, and tests directives with ``sbatch --test-only``; no job is ever submitted. Where
    ``partition`` is None, its default one is tested, or the first with GPUs when that has none.
    Raises ConfigError where there is no SLURM or no such partition, StartError when it does not answer.
    """
    listing = await _ask(run_command, "sinfo", "--noheader", "-o", answers.PARTITION_FORMAT)
    partitions = answers.partitions(listing.stdout)
    if not partitions:
        raise StartError(
            "sinfo names no partition that you may use; "
            f"it said: {(listing.stderr or listing.stdout).strip() or 'nothing'}"
        )
    tested = _tested(partitions, partition)
    config = answers.settings((await _ask(run_command, "scontrol", "show", "config")).stdout)
    notes: list[str] = []
    cluster_name = config.get("ClusterName", "unnamed")
    default_account, accounts = await _accounts(run_command, cluster_name, notes)
    mpi = await run_command(["srun", "--mpi=list"])
    mpi_types = answers.mpi_types(mpi.stdout, mpi.stderr)
    if not mpi_types:
        notes.append(f"srun --mpi=list names nothing: {mpi.complaint}")

    known = account or default_account
    count = num_gpus or tested.gpus_per_node or 1
    named = partition or (None if tested.is_default else tested.name)
    wanted = Wanted(
        num_gpus=count,
        given=(
            *((f"--partition={named}",) if named else ()),
            *((f"--account={account}",) if account else ()),
        ),
        account=known,
        accounts=tuple(dict.fromkeys([*([known] if known else []), *accounts])),
        partitions=tuple(one.name for one in _likely(partitions)),
    )
    outcome = await try_directives(run_command, wanted)
    notes += outcome.notes
    if outcome.complaint:
        notes.append(
            f"sbatch accepts not even a plain job of one node, so no directive was tested: "
            f"{outcome.complaint}; try --partition, --account or --gpus"
        )
    if _CONTAINER.search((await run_command(["srun", "--help"])).stdout):
        # pyxis gives its options to srun; older ones do not give them to sbatch as well.
        outcome.accepts["--container-image"] = ACCEPTED
    chosen = [one for one in outcome.required if directive_of(one) == "--partition"]
    return Profile(
        cluster_name=cluster_name,
        slurm_version=config.get("SLURM_VERSION", "") or await _version(run_command),
        mpi_types=mpi_types,
        partitions=partitions,
        default_account=default_account,
        accounts=accounts,
        accepts=outcome.accepts,
        takes_jobs=not outcome.complaint,
        required=outcome.required,
        partition=chosen[0].partition("=")[2] if chosen else named,
        notes=tuple(notes),
        probed_at_s=time.time(),
    )


async def cluster_name(run_command: RunCommand) -> str:
    """Return the name of the cluster that SLURM's commands talk to here."""
    config = answers.settings((await _ask(run_command, "scontrol", "show", "config")).stdout)
    return config.get("ClusterName", "unnamed")


async def node_addresses(run_command: RunCommand, nodes: str) -> dict[str, str]:
    """Return the address of each node of a hostlist, a name or numbers, as SLURM itself uses it."""
    words = ("--noheader", "-N", "--nodes", nodes, "-o", answers.NODE_FORMAT)
    return answers.node_addresses((await _ask(run_command, "sinfo", *words)).stdout)


async def _ask(run_command: RunCommand, *argv: str) -> Answer:
    """Run a command that must work where there is SLURM."""
    answer = await run_command(argv)
    if answer.is_missing:
        raise ConfigError(
            f"no SLURM on this host: {answer.complaint}; run this on the cluster's login node, or load "
            "its module first"
        )
    if answer.code:
        raise StartError(
            f"{' '.join(argv[:3])} failed: {answer.complaint}; is SLURM's controller up (scontrol ping)?"
        )
    return answer


async def _version(run_command: RunCommand) -> str:
    said = (await run_command(["sinfo", "--version"])).stdout
    found = re.search(r"^slurm\S* (\S+)", said, re.MULTILINE)
    return found[1] if found else "unknown"


async def _accounts(
    run_command: RunCommand, cluster: str, notes: list[str]
) -> tuple[str | None, tuple[str, ...]]:
    """Return the user's default account and all of them; none, and a note, without a database."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        notes.append(f"accounts are not known: user id {os.getuid()} has no name on this host")
        return None, ()
    listed = await run_command(
        ["sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=user,account,cluster"]
    )
    if listed.code:
        notes.append(f"accounts are not known, sacctmgr cannot tell: {listed.complaint}")
        return None, ()
    found = answers.associations(listed.stdout, user)
    here = [one.account for one in found if one.cluster.lower() == cluster.lower()]
    names = tuple(dict.fromkeys(here))
    if found and not names:
        others = ", ".join(sorted({one.cluster for one in found}))
        notes.append(f"{user} has no account on {cluster}, only on {others}")
    chosen = await run_command(
        ["sacctmgr", "-nP", "show", "user", user, "format=user,defaultaccount"]
    )
    default = answers.default_account(chosen.stdout, user) if chosen.code == 0 else None
    # The default belongs to one cluster, where the database serves several.
    return (default if default in names else None), names


def _tested(partitions: Sequence[Partition], asked: str | None) -> Partition:
    if asked is None:
        return _likely(partitions)[0]
    for one in partitions:
        if one.name == asked:
            return one
    raise ConfigError(
        f"--partition {asked}: there are {', '.join(one.name for one in partitions)}",
        param="partition",
    )


def _likely(partitions: Sequence[Partition]) -> list[Partition]:
    """Return partitions in the order a user would want them: up, with GPUs, the default one."""
    return sorted(
        partitions,
        key=lambda one: (one.state != "up", not one.gpus_per_node, not one.is_default),
    )

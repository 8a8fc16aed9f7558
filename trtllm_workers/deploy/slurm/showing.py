"""A cluster's profile for people: what it offers, what jobs will be given because of it, what to do. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trtllm_workers.config.tables import table
from trtllm_workers.deploy.report import duration
from trtllm_workers.deploy.slurm.picks import MpiNeeds, gpu_flags, pick_account, pick_mpi
from trtllm_workers.deploy.slurm.profile import Partition, Profile, age
from trtllm_workers.deploy.slurm.trials import directive_of
from trtllm_workers.errors import ConfigError

_MPI_NEEDS: tuple[tuple[MpiNeeds, str], ...] = (("openmpi", "Open MPI"), ("mpich", "MPICH"))


def as_text(profile: Profile, *, now_s: float, account: str | None, num_gpus: int | None) -> str:
    """Return everything worth knowing of a profile; ``account`` and ``num_gpus`` are what was asked for."""
    blocks = [
        f"cluster {profile.cluster_name}, SLURM {profile.slurm_version}, probed {age(profile, now_s)}",
        _partitions(profile.partitions),
        "\n".join([f"accounts  {_accounts(profile)}", f"MPI       {_listed(profile.mpi_types)}"]),
    ]
    if profile.accepts:
        rows = [(name, one.kind, one.text or "-") for name, one in profile.accepts.items()]
        blocks.append(table(("DIRECTIVE", "VERDICT", "SBATCH SAID"), rows))
    uses, remedies = _uses(profile, account, num_gpus)
    blocks.append("slurm run will use\n" + _indented(uses))
    if remedies:
        blocks.append("to do\n" + "\n".join(f"  → {one}" for one in remedies))
    if profile.notes:
        blocks.append("\n".join(f"note: {one}" for one in profile.notes))
    return "\n\n".join(blocks)


def _partitions(partitions: Sequence[Partition]) -> str:
    header = ("PARTITION", "STATE", "NODES", "IDLE", "MAX TIME", "GPUS/NODE", "CPUS/NODE")
    rows = [
        (
            f"{one.name}{'*' * one.is_default}",
            one.state,
            str(one.num_nodes),
            str(one.num_idle_nodes),
            "no limit" if one.max_time_s is None else duration(one.max_time_s),
            f"{one.gpus_per_node} {one.gpu_type}".strip() if one.gpus_per_node else "-",
            str(one.cpus_per_node),
        )
        for one in partitions
    ]
    return table(header, rows)


def _accounts(profile: Profile) -> str:
    names = [
        f"{name} (default)" if name == profile.default_account else name
        for name in profile.accounts
    ]
    return _listed(names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none known"


def _uses(
    profile: Profile, account: str | None, num_gpus: int | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return what jobs are given, as rows, and what keeps them from being given more."""
    remedies: list[str] = []

    def picked(pick: Callable[..., str | None], *words: Any) -> str | None:
        try:
            return pick(*words)
        except ConfigError as wrong:
            remedies.append(str(wrong))
            return "-"

    rows = [
        ("partition", f"--partition={profile.partition}" if profile.partition else "the default"),
        ("account", _flag("--account", picked(pick_account, profile, account)) or "the default"),
        ("GPUs", _gpus(profile, num_gpus, remedies)),
    ]
    for needs, name in _MPI_NEEDS:
        mpi = _flag("--mpi", picked(pick_mpi, profile, None, needs)) or "-"
        rows.append((f"{name} ranks", mpi))
    if profile.usable("--container-image"):
        rows.append(("containers", "--container-image (pyxis)"))
    else:
        rows.append(("containers", "-"))
        remedies.append(
            "no pyxis here, so no --container-image: install trtllm-launch and the engine where every "
            "node sees it, on a shared file system"
        )
    shown = ("--account", "--partition", "--gpus-per-node", "--gres", "--time")
    others = [flag for flag in profile.required if directive_of(flag) not in shown]
    if others:
        rows.append(("also", " ".join(others)))
    if any(directive_of(flag) == "--time" for flag in profile.required):
        remedies.append("this cluster takes no job without a time limit: give slurm run --time")
    return rows, remedies


def _flag(name: str, value: str | None) -> str | None:
    return f"{name}={value}" if value and value != "-" else value


def _gpus(profile: Profile, num_gpus: int | None, remedies: list[str]) -> str:
    most = max((one.gpus_per_node for one in profile.partitions), default=0)
    flags = gpu_flags(profile, num_gpus or most)
    if flags:
        return " ".join(flags)
    if most:
        remedies.append("sbatch refuses both ways of asking for GPUs; its words stand above")
    else:
        remedies.append(
            "SLURM knows of no GPUs here; where nodes have some all the same, jobs get whole nodes, so "
            "say how many each has with --gpus"
        )
    return "none asked for"


def _indented(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name.ljust(width)}  {value}" for name, value in rows)

"""What SLURM's commands print, as values. Pure; lines of banners and modules between are passed over."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from trtllm_workers.deploy.slurm.profile import Partition

# In front of every line of ours: what a login banner prints has no such line.
MARK: Final = "@trtllm@"
PARTITION_FORMAT: Final = f"{MARK}%R|%P|%a|%F|%l|%G|%c"
NODE_FORMAT: Final = f"{MARK}%N|%o"

_SETTING: Final = re.compile(r"(\w+)\s*=\s?(.*)")
_MPI_HEAD: Final = re.compile(r"(?:srun: )?MPI (?:plugin )?types are")
_MPI_TYPE: Final = re.compile(r"(?:srun: )?\s*([a-z][a-z0-9_]*)\s*")
_PMIX_VERSIONS: Final = re.compile(r"(?:srun: )?specific pmix plugin versions available:\s*(.*)")
_GPU: Final = re.compile(r"gpu(?::([^:(,]+))??(?::(\d+)([KM]?))?(?:\(.*?\))?")
_DAYS: Final = re.compile(r"(?:(\d+)-)?(\d+(?::\d+)*)")
_FACTORS: Final = {"": 1, "K": 1024, "M": 1024 * 1024}


@dataclass(frozen=True, slots=True)
class Association:
    """One account of a user on one cluster."""

    account: str
    cluster: str


def partitions(stdout: str) -> tuple[Partition, ...]:
    """Read ``sinfo`` with PARTITION_FORMAT; nodes that differ come as several lines of a partition."""
    found: dict[str, Partition] = {}
    for fields in _marked(stdout, 7):
        name, flagged, state, nodes, limit, gres, cpus = fields
        counts = [int(number) for number in re.findall(r"\d+", nodes)]
        gpus, kind = _gpus(gres)
        before = found.get(name, Partition(name=name))
        more = gpus >= before.gpus_per_node
        found[name] = Partition(
            name=name,
            is_default=before.is_default or flagged.endswith("*"),
            state=state,
            num_nodes=before.num_nodes + (counts[3] if len(counts) == 4 else 0),
            num_idle_nodes=before.num_idle_nodes + (counts[1] if len(counts) == 4 else 0),
            max_time_s=seconds(limit),
            gpus_per_node=gpus if more else before.gpus_per_node,
            gpu_type=kind if more else before.gpu_type,
            cpus_per_node=max(before.cpus_per_node, _first_number(cpus)),
        )
    return tuple(found.values())


def node_addresses(stdout: str) -> dict[str, str]:
    """Read ``sinfo -N`` with NODE_FORMAT: each node's address as SLURM knows it."""
    return {name: address for name, address in _marked(stdout, 2)}


def settings(stdout: str) -> dict[str, str]:
    """Read ``scontrol show config``; a setting without a value is left out."""
    found: dict[str, str] = {}
    for line in stdout.splitlines():
        match = _SETTING.fullmatch(line.strip())
        if match and match[2] not in ("", "(null)"):
            found.setdefault(match[1], match[2].strip())
    return found


def mpi_types(stdout: str, stderr: str) -> tuple[str, ...]:
    """Read ``srun --mpi=list``.

    Up to SLURM 21.08 this list is printed to stderr, each line with the program's name. It is the one
    answer that is looked for there, and only behind its headline.
    """
    for text in (stdout, stderr):
        names: list[str] = []
        seen_head = False
        for line in text.splitlines():
            if _MPI_HEAD.match(line):
                seen_head = True
            elif not seen_head:
                continue
            elif versions := _PMIX_VERSIONS.match(line):
                names += re.findall(r"pmix\w*", versions[1])
            elif kind := _MPI_TYPE.fullmatch(line):
                names.append(kind[1])
        if names:
            return tuple(dict.fromkeys(names))
    return ()


def associations(stdout: str, user: str) -> tuple[Association, ...]:
    """Read ``sacctmgr -nP show assoc format=user,account,cluster``; each pair once."""
    rows = [line.strip().split("|") for line in stdout.splitlines()]
    found = [Association(row[1], row[2]) for row in rows if len(row) == 3 and row[0] == user]
    return tuple(dict.fromkeys(one for one in found if one.account))


def default_account(stdout: str, user: str) -> str | None:
    """Read ``sacctmgr -nP show user format=user,defaultaccount``."""
    rows = [line.strip().split("|") for line in stdout.splitlines()]
    return next((row[1] for row in rows if len(row) == 2 and row[0] == user and row[1]), None)


def seconds(limit: str) -> float | None:
    """Read a time of SLURM: minutes, ``hours:minutes:seconds``, ``days-hours…``; None for no limit."""
    match = _DAYS.fullmatch(limit.strip())
    if not match:
        return None
    numbers = [int(number) for number in match[2].split(":")]
    if match[1]:  # days-hours[:minutes[:seconds]]
        hours, minutes, rest = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, rest = numbers
    else:  # minutes[:seconds]
        hours, (minutes, rest) = 0, (*numbers, 0)[:2]
    return float(((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + rest)


def _marked(stdout: str, num_fields: int) -> Sequence[list[str]]:
    # The mark need not start the line: a banner may lack its last newline.
    rows = [line.partition(MARK)[2].split("|") for line in stdout.splitlines() if MARK in line]
    return [[field.strip() for field in row] for row in rows if len(row) == num_fields]


def _gpus(gres: str) -> tuple[int, str]:
    """Return how many GPUs a node's gres has and of what type: ``gpu:h100:8(S:0-1),nvme:1``."""
    total, kind = 0, ""
    for one in re.split(r",(?![^(]*\))", gres):
        if match := _GPU.fullmatch(one.strip()):
            total += int(match[2] or 1) * _FACTORS[match[3] or ""]
            kind = kind or (match[1] or "").replace("no_consume", "")
    return total, kind


def _first_number(text: str) -> int:
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0

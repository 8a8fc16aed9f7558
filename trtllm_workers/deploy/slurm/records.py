"""What the parts of a job on SLURM write down for each other, in the run's folder on a shared file system.

::

    <run id>/slurm.json            the job: its id, nodes, what runs where
             environment.json      variables that every rank gets, 0600: there are secrets among them
             tasks/NAME.json       what each rank of a part executes
             ranks/NAME.3.json     what rank 3 found where it started
             nodes/NODE.json       what the check of a node found
             stop                  somebody wants the run to end

A message between hosts goes through such a file and never through the output of a command, which others
write into as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")

JOB = "slurm.json"
ENVIRONMENT = "environment.json"
STOP = "stop"


class Part(msgspec.Struct, frozen=True):
    """One part of a job: on which nodes its ranks are, in their order."""

    name: str
    role: str
    nodes: tuple[str, ...]
    ranks_per_node: int = 1


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What slurm.json holds. ``submitted``: the run made the job and may cancel it."""

    run_id: str
    job_id: str
    head: str
    nodes: tuple[str, ...]
    parts: tuple[Part, ...]
    driver_host: str
    submitted: bool = False


class Environment(msgspec.Struct, frozen=True):
    """The variables that a run decided for all its ranks; ``digest`` is over them."""

    values: dict[str, str]
    digest: str


class TaskSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank of one part executes.

    ``argv`` may hold ``@address`` (the node's own address) and ``@etcd`` (the URL of the run's etcd,
    read from ``etcd_status`` once it listens). ``launcher`` is a program that stands before it on every
    rank, and passes arguments on badly.
    """

    run_id: str
    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    status: str
    log: str
    num_ranks: int = 1
    interface: str | None = None
    etcd_status: str = ""
    wait_s: float = 300.0
    launcher: str = ""


class RankRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank found where it started; ``variables`` are those that all ranks must see alike.

    A secret one is there only as a hash. ``changed`` tells which the node had set otherwise.
    """

    rank: int
    node: str
    host: str
    pid: int
    address: str
    digest: str
    variables: dict[str, str]
    changed: tuple[str, ...] = ()


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the check of a node found; ``problems`` is empty when it will do."""

    node: str
    host: str
    address: str
    version: str
    python: str
    now_s: float
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def write(path: Path, record: msgspec.Struct, mode: int = 0o600) -> None:
    """Replace a record atomically; no reader ever sees half of one. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(record))
    draft.replace(path)


def read(path: Path, kind: type[T]) -> T | None:
    """Return a record, or None when there is none (yet) or it belongs to another version."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def spec_path(folder: Path, name: str) -> Path:
    """Return where it says what the ranks of a part execute."""
    return folder / "tasks" / f"{name}.json"


def rank_path(folder: Path, name: str, rank: int) -> Path:
    """Return where a rank writes what it found."""
    return folder / "ranks" / f"{name}.{rank}.json"


def node_path(folder: Path, node: str) -> Path:
    """Return where the check of a node writes what it found."""
    return folder / "nodes" / f"{node}.json"

"""What one SLURM cluster offers, as values, and the file where that is kept. Asks nobody."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from trtllm_workers.deploy.report import duration
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``sbatch --test-only`` made of one directive; ``text`` is what it said when it refused.

    ``required``: without it nothing is accepted.
    """

    kind: Literal["accepted", "refused", "required"]
    text: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether a job may have the directive."""
        return self.kind != "refused"


ACCEPTED = Verdict("accepted")
REQUIRED = Verdict("required")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition. Where its nodes differ, GPUs and CPUs are those of the largest.

    ``max_time_s`` None: no limit. ``gpus_per_node`` counts what SLURM knows as gres; a cluster that
    does not declare its GPUs shows 0.
    """

    name: str
    is_default: bool = False
    state: str = "up"
    num_nodes: int = 0
    num_idle_nodes: int = 0
    max_time_s: float | None = None
    gpus_per_node: int = 0
    gpu_type: str = ""
    cpus_per_node: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a cluster offers this user, as it answered at ``probed_at_s`` (seconds since 1970).

    ``accepts`` maps a directive (``--gpus-per-node``) to its verdict; one that could not be tested is
    not in it. Without ``takes_jobs`` sbatch accepted no job at all, and ``notes`` say what it said.
    ``required`` are whole flags without which ``sbatch`` accepted nothing. ``partition`` is
    the one the tests named, None where SLURM's default was enough. ``notes`` are for people.
    """

    cluster_name: str
    slurm_version: str
    mpi_types: tuple[str, ...] = ()
    partitions: tuple[Partition, ...] = ()
    default_account: str | None = None
    accounts: tuple[str, ...] = ()
    accepts: Mapping[str, Verdict] = field(default_factory=dict)
    takes_jobs: bool = True
    required: tuple[str, ...] = ()
    partition: str | None = None
    notes: tuple[str, ...] = ()
    probed_at_s: float = 0.0

    def usable(self, directive: str) -> bool | None:
        """Return whether a directive may be given; None when that is not known."""
        verdict = self.accepts.get(directive)
        return None if verdict is None else verdict.is_usable


def profile_path(state_dir: Path, cluster_name: str) -> Path:
    """Return where a cluster's profile is kept under the launcher's state folder."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", cluster_name).lstrip(".") or "unnamed"
    return state_dir / "slurm" / f"{safe}.json"


def newest_profile(state_dir: Path) -> Path | None:
    """Return the profile that was kept last under a state folder; None when there is none.

    One state folder seldom serves two clusters; where it does, the last one probed is meant.
    """
    found = sorted((state_dir / "slurm").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def save(profile: Profile, path: Path) -> None:
    """Write a profile; whoever reads meanwhile sees the old one or the new one, whole.

    Raises ConfigError when the place cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(profile), indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text + b"\n")
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as wrong:
        raise ConfigError(
            f"{path}: the cluster's profile cannot be kept: {wrong.strerror or wrong}; "
            "choose another place with RUN_DIR, or probe with --no-save"
        ) from None


def load(path: Path, warn: Callable[[str], object] = log.warning) -> Profile | None:
    """Return a kept profile; None when there is none, or one that cannot be read, which is said."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except FileNotFoundError:
        return None
    except OSError as wrong:
        trouble = wrong.strerror or str(wrong)
    except msgspec.DecodeError as wrong:
        trouble = str(wrong)
    warn(
        f"{path}: this profile of a cluster cannot be read and is ignored ({trouble}); "
        "write it anew with: trtllm-launch slurm probe"
    )
    return None


def age(profile: Profile, now_s: float) -> str:
    """Return how long ago a profile was probed, for people."""
    return f"{duration(max(0.0, now_s - profile.probed_at_s))} ago"

"""srun's words for one part of a job. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtllm_workers.deploy.mpi import of_a_world
from trtllm_workers.errors import ConfigError

# What srun needs of the environment to find its job; the rest are defaults for options that we all give.
_KEPT = frozenset(
    {
        *("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTER_NAME", "SLURM_JOB_UID"),
        *("SLURM_JOB_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
        *("SLURM_JOB_PARTITION", "SLURM_JOB_ACCOUNT", "SLURM_JOB_QOS", "SLURM_JOB_USER"),
        *("SLURM_WORKING_CLUSTER", "SLURM_NODE_ALIASES", "SLURM_JOB_NAME", "SLURM_TASKS_PER_NODE"),
        *("SLURM_JOB_CPUS_PER_NODE", "SLURM_SUBMIT_DIR", "SLURM_SUBMIT_HOST", "SLURM_JOB_GPUS"),
    }
)


@dataclass(frozen=True, slots=True)
class Container:
    """What pyxis is told. ``name``: under which the unpacked image stays on a node, once for all parts."""

    image: str = ""
    mounts: tuple[str, ...] = ()
    name: str = ""

    def words(self, *, first: bool) -> tuple[str, ...]:
        """Return pyxis' options: the ``first`` step unpacks the image, the others enter what it left."""
        if not self.image:
            return ()
        mounts = ("--container-mounts=" + ",".join(self.mounts),) if self.mounts else ()
        image = (f"--container-image={self.image}",) if first else ()
        return (*image, f"--container-name={self.name}", *mounts, "--no-container-mount-home")


@dataclass(frozen=True, slots=True)
class Step:
    """One srun: ``ranks_per_node`` tasks on each of ``nodes``. ``mpi`` "none": they do not need each other."""

    name: str
    nodes: tuple[str, ...]
    ranks_per_node: int = 1
    mpi: str = "none"

    @property
    def num_ranks(self) -> int:
        """Tasks in all."""
        return len(self.nodes) * self.ranks_per_node


def srun_words(
    step: Step,
    command: Sequence[str],
    *,
    run_id: str,
    container: Container = Container(),
    more: Sequence[str] = (),
    first: bool = False,
) -> tuple[str, ...]:
    """Return the whole command line of a step.

    * Steps overlap: the ingress shares its node with a worker, and checks run beside both.
    * ``--export=ALL``: what counts comes in a file all the same (``task.py``).
    * ``--unbuffered`` is not used: it mixes ranks within a line; with ``--label`` each line says whose
      it is.
    * One rank that fails ends its step, and a step of one node that is lost ends at once.
    """
    return (
        "srun",
        f"--job-name={run_id}.{step.name}",
        f"--nodes={len(step.nodes)}",
        f"--ntasks={step.num_ranks}",
        f"--ntasks-per-node={step.ranks_per_node}",
        f"--nodelist={','.join(step.nodes)}",
        # The order of ranks is the order of nodes as they are listed, not as SLURM sorts them.
        "--distribution=block",
        f"--mpi={step.mpi}",
        *("--overlap", "--oversubscribe", "--cpu-bind=none", "--export=ALL"),
        *("--kill-on-bad-exit=1", "--wait=10", "--input=none"),
        *(("--label",) if step.num_ranks > 1 else ()),
        *container.words(first=first),
        *more,
        *command,
    )


def split_words(text: str | None, flag: str) -> tuple[str, ...]:
    """Return words as a shell would split them. Raises ConfigError naming ``flag``."""
    try:
        return tuple(shlex.split(text or ""))
    except ValueError as wrong:
        raise ConfigError(
            f"{flag}: {wrong}: {text}", param=flag.lstrip("-").replace("-", "_")
        ) from wrong


def mounts_of(text: str | None, needed: Sequence[str]) -> tuple[str, ...]:
    """Return the mounts that were asked for, and those of ``needed`` paths that they do not cover.

    A needed path lies at the same place inside: commands name it. Raises ConfigError for what is no mount.
    """
    asked = [one.strip() for one in (text or "").split(",") if one.strip()]
    inside = []
    for one in asked:
        parts = one.split(":")
        if len(parts) not in (2, 3) or not all(part.startswith("/") for part in parts[:2]):
            raise ConfigError(
                f"MOUNTS: {one!r} is no mount; write FROM:TO with absolute paths, several with commas",
                param="mounts",
            )
        inside.append((parts[0], parts[1]))
    found = list(asked)
    for path in dict.fromkeys(needed):
        if any(char in path for char in ",:"):
            raise ConfigError(
                f"{path} must be mounted into the container, and pyxis has no way to write a path with a "
                "comma or a colon; move it, or mount it from elsewhere with MOUNTS",
                param="mounts",
            )
        covered = any(
            source == target and (path == source or path.startswith(source.rstrip("/") + "/"))
            for source, target in inside
        )
        if not covered and not any(target == path for _, target in inside):
            found.append(f"{path}:{path}")
            inside.append((path, path))
    return tuple(found)


def unset_for_srun(environ: Mapping[str, str]) -> frozenset[str]:
    """Return the variables that would change what our sruns mean: another step's, or defaults of options."""
    found = {
        name
        for name in environ
        if name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")) and name not in _KEPT
    }
    others = {name for name in of_a_world(environ) if not name.startswith("SLURM_")}
    return frozenset(found | others)

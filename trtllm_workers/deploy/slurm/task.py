"""What srun starts for each rank: prepares its environment, says where it is, becomes the part.

    python -P -m trtllm_workers.deploy.slurm.task RUN_FOLDER NAME
    python -P -m trtllm_workers.deploy.slurm.task RUN_FOLDER --clear

It ends by exec: the rank is then srun's own child, with the descriptors of PMI that srun gave it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trtllm_workers.config.env import (
    PROCESS_LOG,
    RANK_ENV,
    WORLD_SIZE,
    child_environment,
    environment,
)
from trtllm_workers.deploy import proc
from trtllm_workers.deploy.end import end_processes
from trtllm_workers.deploy.etcd import etcd_folder
from trtllm_workers.deploy.mpi import through_llmapi_launch
from trtllm_workers.deploy.output import rank_log
from trtllm_workers.deploy.parent import PARENT_PID
from trtllm_workers.deploy.run import members_of
from trtllm_workers.deploy.shm import remove_left_overs, remove_unused_of_worlds
from trtllm_workers.deploy.slurm import records, variables
from trtllm_workers.deploy.slurm.addresses import choose
from trtllm_workers.errors import LaunchError, StartError
from trtllm_workers.observe.status import StatusFile, read_status

ADDRESS = "@address"
ETCD_URL = "@etcd"
_LOOK_S = 0.05
_CLEAR_GRACE_S = 2.0
_KILL_WAIT_S = 5.0


def main(words: Sequence[str]) -> int:
    """Run one rank, or clear a node. Returns only when it could not become the part."""
    folder, name = Path(words[0]), words[1]
    if name == "--clear":
        return clear(folder.name)
    try:
        argv, environ, cwd = prepare(folder, name, environment())
    except (LaunchError, OSError) as wrong:
        sys.stderr.write(f"trtllm-launch: {wrong}\n")
        return wrong.exit_code if isinstance(wrong, LaunchError) else 3
    os.chdir(cwd if os.path.isdir(cwd) else "/")
    try:
        os.execvpe(argv[0], argv, environ)
    except OSError as wrong:
        sys.stderr.write(
            f"trtllm-launch: cannot execute {argv[0]} on {os.uname().nodename}: {wrong.strerror}\n"
        )
        return 127


def prepare(
    folder: Path, name: str, here: Mapping[str, str]
) -> tuple[list[str], dict[str, str], str]:
    """Return what to execute, with which environment, and where. Raises LaunchError, OSError."""
    spec = records.read(records.spec_path(folder, name), records.TaskSpec)
    sent = records.read(folder / records.ENVIRONMENT, records.Environment)
    node = here.get("SLURMD_NODENAME") or os.uname().nodename
    if spec is None or sent is None:
        raise StartError(
            f"{node} does not see what to run in {folder}: it must lie on a file system that all nodes "
            "share; choose one with --run-dir"
        )
    rank = _number(here, "SLURM_PROCID")
    if _number(here, "SLURM_LOCALID") == 0:
        # What a predecessor of the same name left; no rank of this one can have begun before all have.
        remove_left_overs(spec.run_id, spec.name)
    if rank == 0:
        StatusFile(Path(spec.status)).report("starting", detail=f"on {node}")
    _require_world(spec, here)
    host, address = (
        os.uname().nodename,
        choose(spec.interface, here.get("SLURMD_NODENAME") or None).address,
    )
    tags: dict[str, str | None] = {
        PARENT_PID: None,
        PROCESS_LOG: str(rank_log(Path(spec.log), rank) if spec.num_ranks > 1 else spec.log),
        RANK_ENV: None,
    }
    if (
        spec.num_ranks > 1 and not spec.launcher
    ):  # which keeps MPI's world from the worker's command
        tags[WORLD_SIZE] = str(spec.num_ranks)
    environ = child_environment({**sent.values, **spec.env, **tags})
    seen = variables.comparable(environ)
    records.write(
        records.rank_path(folder, name, rank),
        records.RankRecord(
            rank=rank,
            node=node,
            host=host,
            pid=os.getpid(),
            address=address,
            digest=variables.digest(seen),
            variables=seen,
            changed=variables.changed_on_node(here, sent.values),
        ),
    )
    argv = [address if word == ADDRESS else word for word in spec.argv]
    if ETCD_URL in argv:
        url = _etcd_url(spec, node, rank)
        argv = [url if word == ETCD_URL else word for word in argv]
    if spec.launcher:
        words, more = through_llmapi_launch(argv[0], argv[1:])
        argv, environ = [spec.launcher, *words], environ | more
    return argv, environ, spec.cwd


def clear(run_id: str) -> int:
    """End what a run left on this node, and remove its names in /dev/shm."""
    own = {os.getpid(), os.getppid()}

    def left() -> list[proc.Proc]:
        return [one for one in members_of(run_id) if one.pid not in own]

    end_processes(left, _CLEAR_GRACE_S, _KILL_WAIT_S)
    remove_left_overs(run_id)
    remove_unused_of_worlds()
    shutil.rmtree(etcd_folder(run_id), ignore_errors=True)
    return 0


def _require_world(spec: records.TaskSpec, here: Mapping[str, str]) -> None:
    started = _number(here, "SLURM_NTASKS", 1)
    if started != spec.num_ranks:
        raise StartError(
            f"srun started {started} tasks of {spec.name}, which has {spec.num_ranks} ranks; something in "
            "SRUN_ARGS changes the number of tasks"
        )


def _etcd_url(spec: records.TaskSpec, node: str, rank: int) -> str:
    """Wait until the run's etcd tells its URL. Raises StartError."""
    ends_s = time.monotonic() + spec.wait_s
    status = Path(spec.etcd_status)
    if rank == 0:
        StatusFile(Path(spec.status)).report("starting", detail=f"on {node}, waiting for etcd")
    while time.monotonic() < ends_s:
        told = read_status(status)
        if told is not None and told.step == "listening":
            return told.detail
        time.sleep(_LOOK_S)
    raise StartError(
        f"{spec.name} on {node}: the run's etcd did not listen within {spec.wait_s:g} s ({status})"
    )


def _number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdigit() else default


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Workers of several ranks under the real mpiexec: which rank died, and that none is left."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.support import FAKE_PART, Launch, gone, launched_fakes
from trtllm_workers.deploy import world
from trtllm_workers.deploy.inventory import mpiexec_path
from trtllm_workers.deploy.run import find_runs, ranks_of

READY = r"ready after"
CHATTER = """\
loading shard 2 of 5

===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 32158 RUNNING AT vm
=   EXIT CODE: 9
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
This typically refers to a problem with your application.
Please see the FAQ page for debugging suggestions""".splitlines()
ABORT = "Abort(2) on node 1 (rank 1 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 2)"


def test_rank_that_said_so_is_the_culprit_else_the_first_that_was_gone() -> None:
    assert world.culprit(["a", ABORT], first_ended=0) == 1
    assert world.culprit(CHATTER, first_ended=3) == 3
    assert world.culprit(CHATTER, first_ended=None) is None


def test_signal_is_read_from_what_mpiexec_says() -> None:
    assert world.exit_status(9, CHATTER) == -9
    assert world.exit_status(2, [ABORT]) == 2


def test_report_leaves_out_what_mpiexec_says() -> None:
    assert world.without_chatter([*CHATTER, ABORT]) == ["loading shard 2 of 5"]


OPEN_MPI_KILLED = """\
loading shard 2 of 5
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 11135 on node vm exited on
signal 9 (Killed).
--------------------------------------------------------------------------""".splitlines()
OPEN_MPI_EXITED = """\
loading shard 2 of 5
--------------------------------------------------------------------------
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-11217@1,1]
   Exit code:    3
--------------------------------------------------------------------------""".splitlines()
OPEN_MPI_ABORTED = """\
loading shard 2 of 5
--------------------------------------------------------------------------
MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD
  Proc: [[7230,1],1]
  Errorcode: 2

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
You may or may not see output from other processes, depending on
exactly when Open MPI kills them.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
prterun has exited due to process rank 0 with PID 0 on node vm calling
"abort". This may have caused other processes in the application to be
terminated by signals sent by prterun (as reported here).
--------------------------------------------------------------------------""".splitlines()
# Open MPI 4 says it in one line, and has the colours of its own rule.
OLDER_OPEN_MPI = """\
loading shard 2 of 5
mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).""".splitlines()
SLURM_KILLED = """\
loading shard 2 of 5
srun: error: sn2: task 1: Killed
srun: Terminating StepId=7.0""".splitlines()


@pytest.mark.parametrize(
    ("lines", "status", "ended"),
    [
        (OPEN_MPI_KILLED, 137, -9),
        (OPEN_MPI_EXITED, 3, 3),
        (OPEN_MPI_ABORTED, 2, 2),
        (OLDER_OPEN_MPI, 137, -9),
        (SLURM_KILLED, 137, -9),
    ],
    ids=["killed", "exited", "aborted", "Open MPI 4", "SLURM"],
)
def test_what_other_starters_say_is_read_and_left_out(
    lines: list[str], status: int, ended: int
) -> None:
    assert world.culprit(lines, first_ended=0) == 1
    assert world.exit_status(status, lines) == ended
    assert world.without_chatter(lines) == ["loading shard 2 of 5"]


@pytest.fixture
def mpiexec() -> str:
    path = mpiexec_path()
    if not path:
        pytest.skip("no mpiexec beside the interpreter: pip install 'trtllm-launch[mpi]'")
    return path


# What Open MPI's mpirun does with a signal to end: all ranks are killed, with no time to drain. And it
# waits for the others when a rank has ended well.
HASTY_MPIRUN = """#!/bin/bash
set -m  # each rank leads a group of its own, as there
for rank in 0 1; do OMPI_COMM_WORLD_RANK=$rank "$@" & pids+=($!); done
trap 'kill -KILL "${pids[@]}"; exit 143' TERM
wait "${pids[0]}" "${pids[1]}"
"""


def launched_world(
    root: Path, mpiexec: str, *behaviour: str, **spec: Any
) -> AbstractContextManager[Launch]:
    status = root / "abc123" / "status" / "worker-0.json"
    argv = [mpiexec, "-launcher", "fork", "-rmk", "user", "-localhost", "127.0.0.1", "-n", "2"]
    argv += [*FAKE_PART, "worker", str(status), *behaviour]
    return launched_fakes(root, argv={"worker-0": argv}, num_ranks={"worker-0": 2}, **spec)


def pids_of(launch: Launch) -> list[int]:
    return [int(launch.wait_for(rf"rank {rank} pid (\d+)")[1]) for rank in (0, 1)]


@pytest.mark.e2e
def test_ranks_drain_and_end_with_the_run(tmp_path: Path, mpiexec: str) -> None:
    with launched_world(tmp_path, mpiexec) as launch:
        launch.wait_for(READY)
        pids = pids_of(launch)
        found = ranks_of("abc123", "worker-0")
        assert [found[rank].pid for rank in (0, 1)] == pids
        (run,) = find_runs([tmp_path], elsewhere=False)
        names = {run.members[pid][0] for pid in pids}
        assert names == {"worker-0 rank 0", "worker-0 rank 1"}
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        assert launch.text.count("[worker-0] draining") == 2
        assert all(gone(pid) for pid in pids)


@pytest.mark.e2e
@pytest.mark.parametrize("rank", [0, 1])
def test_death_of_a_rank_ends_the_run_and_names_it(tmp_path: Path, mpiexec: str, rank: int) -> None:
    with launched_world(tmp_path, mpiexec) as launch:
        launch.wait_for(READY)
        pids = pids_of(launch)
        os.kill(pids[rank], signal.SIGKILL)
        assert launch.wait() == 4
        assert f"rank {rank} of worker-0 was killed by SIGKILL (signal 9)" in launch.text
        assert "last 2 lines of worker-0:" in launch.text
        assert all(gone(pid) for pid in pids)


@pytest.mark.e2e
def test_rank_that_ignores_term_is_killed(tmp_path: Path, mpiexec: str) -> None:
    with launched_world(
        tmp_path, mpiexec, "rank1:ignore-term", drain_timeout_s=0.0, hasty=True
    ) as launch:
        launch.wait_for(READY)
        pids = pids_of(launch)
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        assert all(gone(pid) for pid in pids)


@pytest.mark.e2e
def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path, mpiexec: str) -> None:
    with launched_world(tmp_path, mpiexec) as launch:
        launch.wait_for(READY)
        pids = pids_of(launch)
        os.kill(launch.pid, signal.SIGKILL)
        assert all(gone(pid) for pid in pids)


@pytest.mark.e2e
def test_world_that_lost_a_rank_is_started_again_as_a_whole(tmp_path: Path, mpiexec: str) -> None:
    with launched_world(tmp_path, mpiexec, max_restarts=1) as launch:
        launch.wait_for(READY)
        pids = pids_of(launch)
        os.kill(pids[1], signal.SIGKILL)
        launch.wait_for(r"rank 1 of worker-0 was killed by SIGKILL")
        launch.wait_for(r"worker-0 is ready again after")
        assert all(gone(pid, timeout_s=0.0) for pid in pids)
        again = [int(launch.wait_for(rf"life 1 rank {rank} pid (\d+)")[1]) for rank in (0, 1)]
        assert {rank: one.pid for rank, one in ranks_of("abc123", "worker-0").items()} == dict(
            enumerate(again)
        )
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        assert all(gone(pid) for pid in again)


@pytest.mark.e2e
def test_leader_drains_where_mpirun_would_kill_all_ranks_at_once(tmp_path: Path) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(HASTY_MPIRUN)
    mpirun.chmod(0o755)
    status = tmp_path / "abc123" / "status" / "worker-0.json"
    with launched_fakes(
        tmp_path,
        argv={"worker-0": [str(mpirun), *FAKE_PART, "worker", str(status)]},
        num_ranks={"worker-0": 2},
        term_to_leader=["worker-0"],
    ) as launch:
        launch.wait_for(READY)
        pids = pids_of(launch)
        os.kill(launch.pid, signal.SIGTERM)
        assert launch.wait() == 0
        assert launch.text.count("[worker-0] draining") == 1
        assert "had to be killed" not in launch.text
        assert all(gone(pid, timeout_s=0.0) for pid in pids)

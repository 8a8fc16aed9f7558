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


@pytest.fixture
def mpiexec() -> str:
    path = mpiexec_path()
    if not path:
        pytest.skip("no mpiexec beside the interpreter: pip install 'trtllm-launch[mpi]'")
    return path


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

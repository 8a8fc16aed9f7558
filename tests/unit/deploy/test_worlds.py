"""Workers of several ranks under the real mpiexec: which rank died, and that none is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.unit.deploy.support import FAKE_PART, Launch, gone, launched_fakes
from trtllm_workers.deploy import world
from trtllm_workers.deploy.inventory import mpiexec_path
from trtllm_workers.deploy.run import find_runs

READY = r"ready after"
RANKS = 2

needs_mpiexec = pytest.mark.skipif(not mpiexec_path(), reason="pip install 'trtllm-launch[mpi]'")


def launched_world(root: Path, *behaviour: str) -> "LaunchContext":
    status = root / "abc123" / "status" / "worker-0.json"
    argv = [mpiexec_path(), "-launcher", "fork", "-rmk", "user", "-localhost", "127.0.0.1"]
    argv += ["-n", str(RANKS), *FAKE_PART, "worker", str(status), *behaviour]
    return launched_fakes(root, argv={"worker-0": argv}, num_ranks={"worker-0": RANKS})

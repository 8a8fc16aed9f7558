"""A child of the launcher ends when the launcher dies, however it dies. Knows no run.

The kernel sends SIGTERM, so that a worker drains and an ``mpirun`` ends its ranks. What does not
end by itself then is ended by the run's guard (``guard.py``). Imports nothing of the project: the
command runs this before anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal

PARENT_PID = "TRTLLM_LAUNCH_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def end_with_parent(launcher_pid: int) -> None:
    """Ask the kernel for SIGTERM when our parent dies; raise SystemExit if the launcher is gone.

    The launcher need not be the parent: a rank's parent is an ``mpirun``, and ends with it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # Without it (a sandbox) the guard still watches, so the result does not matter.
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    # The launcher may have died between our start and the call above; then no signal will come.
    if os.getppid() != launcher_pid and not _lives(launcher_pid):
        raise SystemExit(0)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

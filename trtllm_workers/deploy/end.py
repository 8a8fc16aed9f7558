"""Ends processes in order: TERM, wait, KILL, and looks again for what appeared meanwhile.

Knows no run: the caller says which processes are meant, anew each time it is asked.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trtllm_workers.deploy import proc

# A process may start another one while it is being ended; a few rounds catch those too.
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Ended:
    """What happened: who ended on TERM, who needed KILL, and who is still there (should be none)."""

    on_term: tuple[proc.Proc, ...] = ()
    on_kill: tuple[proc.Proc, ...] = ()
    left: tuple[proc.Proc, ...] = ()

    @property
    def ended(self) -> tuple[proc.Proc, ...]:
        """Everyone who is gone now."""
        return self.on_term + self.on_kill


def end_processes(
    find: Callable[[], Sequence[proc.Proc]], grace_s: float, kill_wait_s: float
) -> Ended:
    """End all that ``find`` returns, at most ``grace_s`` by TERM, then by KILL. Blocks."""
    began = find()
    # A stopped process (Ctrl-Z, a debugger) would not see TERM before it goes on.
    for number in (signal.SIGTERM, signal.SIGCONT):
        for target in began:
            proc.send(target, number)
    proc.wait_gone(began, grace_s)
    stubborn = find()
    killed: dict[int, proc.Proc] = {}
    deadline = time.monotonic() + kill_wait_s
    for _ in range(_ROUNDS):
        for target in stubborn:
            killed[target.pid] = target
            proc.send(target, signal.SIGKILL)
        proc.wait_gone(stubborn, max(0.0, deadline - time.monotonic()))
        if not (stubborn := find()):
            break
    left = {target.pid for target in stubborn}
    return Ended(
        on_term=tuple(target for target in began if target.pid not in killed),
        on_kill=tuple(target for target in killed.values() if target.pid not in left),
        left=tuple(stubborn),
    )

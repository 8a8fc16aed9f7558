"""A worker of several ranks is one MPI world: which rank ended first, and what its starter says of it.

MPICH's mpiexec ends the whole world with the first rank and returns its exit code, but names no rank,
or a wrong one, when a rank was killed. So the ranks are found by run id and watched here as well. Open
MPI's mpirun and SLURM's srun do name it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from contextlib import suppress

from trtllm_workers.deploy.run import ranks_of

# Ranks appear within a moment of their mpiexec; then the looking ends.
_LOOK_INTERVAL_S = 0.05
# Which rank gave up, in the words of MPICH, Open MPI and SLURM; one that said so itself comes first.
_ABORTS = (
    re.compile(r"^Abort\(\d+\) on node \d+ \(rank (\d+) in comm"),
    re.compile(r"^MPI_ABORT was invoked on rank (\d+) in communicator"),
    re.compile(r"noticed that process rank (\d+) with PID"),
    re.compile(r"^ +Process name: \[.*,(\d+)\]$"),
    re.compile(r"^srun: error: .*: task (\d+): "),
)
_SIGNALS = (
    re.compile(r"APPLICATION TERMINATED WITH THE EXIT STRING: .*\(signal (\d+)\)"),
    re.compile(r"^(?:.* )?exited on +signal (\d+) \("),
    re.compile(r"^signal (\d+) \(.*\)\.$"),
)
# srun names a signal without its number.
_SRUN_SIGNAL = re.compile(r"^srun: error: .*: task \d+: (Killed|Segmentation fault|Aborted)\b")
_SRUN_CODE = re.compile(r"^srun: error: .*: task \d+: Exited with exit code (\d+)$")
_NUMBERS = {"Killed": 9, "Segmentation fault": 11, "Aborted": 6}
# The starters' own words about the end, which say less than the report they would fill.
_CHATTER = re.compile(
    r"^=|^Abort\(\d+\) on node|^YOUR APPLICATION TERMINATED|^This typically refers to a problem"
    r"|^Please see the FAQ page"
    r"|^-{20,}$|^MPI_ABORT was invoked|^  Proc: \[\[|^ +Errorcode: |^NOTE: invoking MPI_ABORT"
    r"|^You may or may not see output|^exactly when Open MPI kills|^(prterun|mpirun) (noticed|detected|has)"
    r"|^signal \d+ \(.*\)\.$|^thus causing the job|^ +Process name: \[|^ +Exit code: +\d+$"
    r"|^\"abort\"\. This may have|^terminated by signals sent by|^Primary job +terminated normally"
    r"|^a non-zero exit code|^srun: (error|Terminating|launch/slurm)"
)


class WorldWatch:
    """Notes in ``first_ended`` which rank of a world ended first; None: it was not seen.

    ``complete`` is set once all ranks are watched.
    """

    def __init__(self, run_id: str, process: str, num_ranks: int) -> None:
        self._run_id = run_id
        self._process = process
        self._num_ranks = num_ranks
        self._handles: dict[int, int] = {}
        self.first_ended: int | None = None
        self.complete = asyncio.Event()

    async def watch(self) -> None:
        """Find the ranks and watch them until cancelled."""
        try:
            while len(self._handles) < self._num_ranks:
                for rank, found in (
                    await asyncio.to_thread(ranks_of, self._run_id, self._process)
                ).items():
                    if rank not in self._handles:
                        with suppress(ProcessLookupError):
                            self._add(rank, os.pidfd_open(found.pid))
                if len(self._handles) < self._num_ranks:
                    await asyncio.sleep(_LOOK_INTERVAL_S)
            self.complete.set()
            await asyncio.Event().wait()
        finally:
            for handle in self._handles.values():
                asyncio.get_running_loop().remove_reader(handle)
                os.close(handle)
            self._handles.clear()

    def _add(self, rank: int, handle: int) -> None:
        self._handles[rank] = handle
        asyncio.get_running_loop().add_reader(handle, self._on_end, rank)

    def _on_end(self, rank: int) -> None:
        asyncio.get_running_loop().remove_reader(self._handles[rank])
        if self.first_ended is None:
            self.first_ended = rank


def culprit(lines: Sequence[str], first_ended: int | None) -> int | None:
    """Return the rank that ended a world: the one that said so, else the first that was gone."""
    for pattern in _ABORTS:
        for line in lines:
            if found := pattern.search(line):
                return int(found[1])
    return first_ended


def exit_status(status: int, lines: Sequence[str]) -> int:
    """Return how the rank ended: its exit code, or minus the signal that the starter tells of.

    srun's own exit code is the highest of all tasks', those included that it killed itself.
    """
    for line in lines:
        if found := _SRUN_CODE.search(line):
            return int(found[1])
        for pattern in _SIGNALS:
            if found := pattern.search(line):
                return -int(found[1])
        if found := _SRUN_SIGNAL.search(line):
            return -_NUMBERS[found[1]]
    return status


def without_chatter(lines: Sequence[str]) -> list[str]:
    """Return the lines without mpiexec's own about the end."""
    return [line for line in lines if line.strip() and not _CHATTER.search(line)]

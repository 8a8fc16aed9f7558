"""Where a run's processes live, as far as the story of a run must know: this host, or a SLURM job.

The default answers are those of one host; ``deploy/slurm/job.py`` has the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from trtllm_workers.deploy.plan import PlannedProcess
from trtllm_workers.deploy.ready import reachable
from trtllm_workers.observe.status import Status, read_status


class Site:
    """What is special about the place of a run; this host needs nothing special.

    * ``prepare`` is awaited when the run's folder is there and before anything starts. It may raise
      ConfigError or StartError; it has deadlines of its own.
    * ``read`` returns what a process has reported. May raise ConfigError for what it finds there.
    * ``url`` returns an address of the ingress that works from here.
    * ``lost`` returns why a process that died cannot be started again where it was, "" when it can.
    * ``ask_to_end`` asks processes to drain and end that a signal to their group would kill; it returns
      those that were asked. It never raises and has a deadline of its own.
    * ``watch`` runs beside a run that serves; ``end_part`` ends a process whose place is gone.
    * ``told_to_stop`` returns when somebody asked for the run's end other than by a signal.
    * ``clear`` is awaited after everything has ended; it never raises and has a deadline of its own.
    """

    manner_of_stopping = "trtllm-launch stop"
    manner_of_looking = "trtllm-launch ps"

    async def prepare(self, say: Callable[[str], None]) -> None:
        """Check and prepare what other hosts must have."""

    def read(self, path: Path) -> Status | None:
        """Return what the process with that status file has reported last."""
        return read_status(path)

    def url(self, told: str) -> str:
        """Return an address of the ingress that works from here."""
        return reachable(told)

    async def lost(self, process: PlannedProcess) -> str:
        """Return why a dead process cannot be started again where it was; "" when it can."""
        del process
        return ""

    async def ask_to_end(self, processes: Sequence[PlannedProcess]) -> set[str]:
        """Ask what a signal would kill to drain and end; return the names of those that were asked."""
        del processes
        return set()

    async def watch(self, end_part: Callable[[str], None]) -> None:
        """Look after the places of a run until cancelled; end parts, by name, whose place is gone."""
        del end_part
        await asyncio.Event().wait()

    async def told_to_stop(self) -> None:
        """Return once somebody has asked for the run's end."""
        await asyncio.Event().wait()

    async def clear(self, say: Callable[[str], None]) -> None:
        """Remove what the run left on other hosts."""

"""Starts a plan's processes, notices each death, clears up after it, ends all. Knows no readiness.

Each process leads a session of its own, so Ctrl-C in the terminal reaches the launcher alone and
one signal to the group reaches everything the process started.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.config.env import PROCESS_LOG
from trtllm_workers.deploy import proc
from trtllm_workers.deploy.end import end_processes
from trtllm_workers.deploy.names import NATS
from trtllm_workers.deploy.output import LogFile, Output, RankedOutput, Terminal
from trtllm_workers.deploy.parent import PARENT_PID
from trtllm_workers.deploy.plan import Plan, PlannedProcess
from trtllm_workers.deploy.run import (
    PROCESS,
    RUN_FOLDER,
    RUN_HOST,
    RUN_ID,
    ProcessRecord,
    members_of,
    of_process,
    ranks_of,
)
from trtllm_workers.deploy.shm import remove_left_overs
from trtllm_workers.deploy.site import Site
from trtllm_workers.deploy.world import WorldWatch, culprit, exit_status, without_chatter
from trtllm_workers.errors import StartError

_CHUNK_BYTES = 64 * 1024
_CHUNKS_PER_TURN = 8  # one chatty process must not keep the others' lines waiting
_LEFT_BEHIND_GRACE_S = 2.0
_KILL_WAIT_S = 5.0
_HURRIED_GRACE_S = 2.0
# Workers without an ingress have nothing left to do; this is for closing their parts.
_LAST_STAGE_S = 5.0
# srun waits so long for slurmd to have killed a step's tasks.
_STEP_KILL_S = 8.0


@dataclass(slots=True)
class Child:
    """One started process. ``status`` is set once it has ended: exit code, or minus the signal.

    ``world`` watches the ranks of a process that is an MPI world, in the task ``watch``. ``restarts``
    counts the processes of this name that died before.
    """

    plan: PlannedProcess
    popen: subprocess.Popen[bytes]
    output: Output
    pidfd: int
    start_ticks: int
    started_s: float
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    status: int | None = None
    ended_s: float = 0.0
    world: WorldWatch | None = None
    watch: asyncio.Task[None] | None = None
    restarts: int = 0

    @property
    def name(self) -> str:
        """The name the plan gave it."""
        return self.plan.name

    def ending(self) -> Ending:
        """Return how it ended; of a world, what is known of the rank that ended it."""
        assert self.status is not None
        lines = self.output.tail()
        lived_s = self.ended_s - self.started_s
        if self.world is None and not self.plan.is_world:
            return Ending(self.status, lines, None, lived_s, self.plan.log)
        rank = culprit(lines, self.world.first_ended if self.world else None)
        status, log = exit_status(self.status, lines), self.plan.log
        if rank is not None and isinstance(self.output, RankedOutput):
            # The rank's own last words; what the starter says of it is told in ours.
            lines, log = self.output.tail_of(rank) or lines, self.output.log_of(rank)
        return Ending(status, without_chatter(lines), rank, lived_s, log)

    def record(self) -> ProcessRecord:
        """Return it as run.json holds it."""
        return ProcessRecord(
            name=self.plan.name,
            role=self.plan.role,
            pid=self.popen.pid,
            start_ticks=self.start_ticks,
            log=str(self.plan.log),
            restarts=self.restarts,
        )


@dataclass(frozen=True, slots=True)
class Ending:
    """How a child, or its ``rank``, ended: exit code or minus the signal, its last lines, its age.

    ``log`` is where more lines are.
    """

    status: int
    lines: list[str]
    rank: int | None
    lived_s: float
    log: Path


class Supervisor:
    """Owns the processes of one run on this host.

    * After ``start`` all of them run, or StartError names the one that could not be started.
    * ``deaths`` gets each child that ended, in order, unless ``end`` was called before.
    * A child's pid is not given back to the system before ``bury`` or ``end`` has ended its whole
      group, so signals to the group cannot reach a stranger.
    * What runs on other hosts is asked to end through the run's ``site``.
    * ``end`` leaves nothing of the run behind; safe after a failed ``start``, safe twice, and safe
      while a ``bury`` is under way.
    """

    def __init__(
        self,
        plan: Plan,
        environ: Mapping[str, str],
        terminal: Terminal,
        site: Site | None = None,
    ) -> None:
        self._site = site or Site()
        self._plan = plan
        self._environ = environ
        self._terminal = terminal
        self._told_about_logs = False
        self._ending = False
        self._handles: list[int] = []
        self.children: list[Child] = []
        self.deaths: asyncio.Queue[Child] = asyncio.Queue()

    def start(self) -> None:
        """Start every process of the plan, in its order."""
        for process in self._plan.processes:
            self._start(process, restarts=0)

    def start_again(self, dead: Child) -> Child:
        """Start a buried child's process anew; its log goes on. Raises StartError."""
        return self._start(dead.plan, restarts=dead.restarts + 1)

    async def bury(self, dead: Child) -> list[proc.Proc]:
        """End what a dead child left of its group and world: TERM, wait, KILL; give its pid back.

        Returns what could not be ended; the child then stays until ``end`` tries again.
        """
        await _cancelled(dead)
        left = await asyncio.to_thread(
            end_processes,
            lambda: self._left_of(dead),
            _LEFT_BEHIND_GRACE_S,
            _KILL_WAIT_S,
        )
        if left.left:
            return list(left.left)
        remove_left_overs(self._plan.run_id, dead.name)
        self.children.remove(dead)
        self._let_go(dead)
        return []

    def kill(self, child: Child) -> None:
        """End a child's group without asking; its death is reported as any other."""
        if not child.plan.nodes:
            _signal_groups([child], signal.SIGKILL)
            return
        # srun answers TERM by killing its step, and KILL by leaving it alone. On a node that is gone nobody
        # answers srun, and nothing is left to kill there.
        _signal_groups([child], signal.SIGTERM)

        def insist() -> None:
            if child.status is None and child.pidfd >= 0:
                _signal_groups([child], signal.SIGKILL)

        asyncio.get_running_loop().call_later(_STEP_KILL_S, insist)

    def child(self, name: str) -> Child:
        """Return the child of that name. Raises KeyError."""
        for child in self.children:
            if child.name == name:
                return child
        raise KeyError(name)

    async def worlds_watched(self, timeout_s: float) -> None:
        """Wait until every rank of every world is watched, or the time is over."""
        worlds = [child.world for child in self.children if child.world is not None]
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for world in worlds:
                    await world.complete.wait()

    async def end(self, grace_s: float, hurry: asyncio.Event) -> list[str]:
        """End everything: TERM to each group, wait up to ``grace_s``, then KILL.

        The ingress goes first, so that its running requests still have workers; the NATS server goes
        last. ``hurry`` cuts the wait to two seconds. Returns the names of those that needed KILL.
        """
        self._ending = True
        for child in self.children:
            await _cancelled(child)
        clock = asyncio.get_running_loop().time
        deadline = clock() + grace_s
        fronts = [child for child in self.children if child.plan.role == "ingress"]
        # Workers that drain still say what became of queued work.
        most = [child for child in self.children if child.plan.role != NATS]
        stages = [(fronts, 0.0), (most, _LAST_STAGE_S)]
        if len(most) < len(self.children):
            stages.append((self.children, _LAST_STAGE_S))
        for stage, least_s in stages:
            await self._ask_to_end(stage)
            # A stopped process (Ctrl-Z, a debugger) would not see TERM before it goes on.
            _signal_groups(stage, signal.SIGCONT)
            await self._exited(stage, max(least_s, deadline - clock()), hurry)
        if hurry.is_set() and not self._all_ended():
            # A second TERM: clients still learn that their streams end.
            _signal_groups(self.children, signal.SIGTERM)
            await self._exited(self.children, _HURRIED_GRACE_S, asyncio.Event())
        in_time = self._all_ended()
        stubborn = [child.name for child in self.children if child.status is None]
        if far := [child for child in self.children if child.plan.nodes and child.status is None]:
            _signal_groups(far, signal.SIGTERM)  # what srun answers by killing its step
            await self._exited(far, _STEP_KILL_S, asyncio.Event())
        if not in_time:
            _signal_groups(self.children, signal.SIGKILL)
        # What left its group (daemons, ranks of a foreign launcher) is still found by run id.
        left_grace_s = _LEFT_BEHIND_GRACE_S if in_time else 0.0
        await asyncio.to_thread(end_processes, self._find, left_grace_s, _KILL_WAIT_S)
        await self._exited(self.children, _KILL_WAIT_S, asyncio.Event())
        for child in self.children:
            self._let_go(child)
        for handle in self._handles:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)
        self._handles.clear()
        remove_left_overs(self._plan.run_id)
        return stubborn

    async def _ask_to_end(self, stage: Sequence[Child]) -> None:
        """Send TERM to each group; a world whose mpirun would not let it drain: to its leader alone."""
        running = [child.plan for child in stage if child.status is None]
        asked = await self._site.ask_to_end(running) if running else set()
        for child in stage:
            if child.name in asked:
                continue
            leader = None
            if child.plan.term_to_leader and child.status is None:
                found = await asyncio.to_thread(ranks_of, self._plan.run_id, child.name)
                leader = found.get(0)
            if leader is None or not self._lead_to_end(child, leader):
                _signal_groups([child], signal.SIGTERM)

    def _lead_to_end(self, child: Child, leader: proc.Proc) -> bool:
        """Ask a leader to end, and some time after it its world; False when it is gone already."""
        loop = asyncio.get_running_loop()
        try:
            handle = os.pidfd_open(leader.pid)
        except OSError:
            return False

        def rest() -> None:
            if child.pidfd >= 0:
                _signal_groups([child], signal.SIGTERM)

        def ended() -> None:
            loop.remove_reader(handle)
            # The other ranks follow by themselves when the engine is closed; else mpirun ends them.
            loop.call_later(_LEFT_BEHIND_GRACE_S, rest)

        loop.add_reader(handle, ended)
        self._handles.append(handle)
        return proc.send(leader, signal.SIGTERM)

    def _start(self, planned: PlannedProcess, *, restarts: int) -> Child:
        try:
            child = self._spawn(planned, restarts)
        except OSError as wrong:
            raise StartError(
                f"{planned.name} could not be started: {wrong.strerror or wrong} "
                f"({wrong.filename or planned.argv[0]})"
            ) from wrong
        self.children.append(child)
        return child

    def _spawn(self, planned: PlannedProcess, restarts: int) -> Child:
        log = LogFile(planned.log, self._on_log_trouble)
        if planned.labelled:
            output: Output = RankedOutput(
                planned.name, log, self._terminal, lambda path: LogFile(path, self._on_log_trouble)
            )
        else:
            output = Output(planned.name, log, self._terminal)
        kept = {name: one for name, one in self._environ.items() if name not in planned.unset}
        popen = subprocess.Popen(
            planned.argv,
            env={**kept, **planned.env, **self._tags(planned)},
            cwd=planned.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        found = proc.read(popen.pid)
        child = Child(
            plan=planned,
            popen=popen,
            output=output,
            pidfd=os.pidfd_open(popen.pid),
            start_ticks=found.start_ticks if found else 0,
            started_s=time.monotonic(),
            restarts=restarts,
        )
        loop = asyncio.get_running_loop()
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        loop.add_reader(popen.stdout.fileno(), self._on_output, child)
        loop.add_reader(child.pidfd, self._on_exit, child)
        if planned.num_ranks > 1:
            child.world = WorldWatch(self._plan.run_id, planned.name, planned.num_ranks)
            child.watch = loop.create_task(child.world.watch())
        return child

    def _tags(self, planned: PlannedProcess) -> dict[str, str]:
        return {
            RUN_ID: self._plan.run_id,
            RUN_FOLDER: str(self._plan.folder.path),
            RUN_HOST: socket.gethostname(),
            PROCESS: planned.name,
            PARENT_PID: str(os.getpid()),
            PROCESS_LOG: str(planned.log),
        }

    def _on_output(self, child: Child) -> None:
        assert child.popen.stdout is not None
        for _ in range(_CHUNKS_PER_TURN):
            try:
                chunk = os.read(child.popen.stdout.fileno(), _CHUNK_BYTES)
            except BlockingIOError:
                return
            if not chunk:
                asyncio.get_running_loop().remove_reader(child.popen.stdout.fileno())
                return
            child.output.feed(chunk)

    def _on_exit(self, child: Child) -> None:
        asyncio.get_running_loop().remove_reader(child.pidfd)
        # Not reaped: the zombie keeps pid and group id taken until the whole run has ended.
        ended = os.waitid(os.P_PID, child.popen.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        killed = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
        child.status = -ended.si_status if killed else ended.si_status
        child.ended_s = time.monotonic()
        self._on_output(child)  # its last words are in the pipe by now
        child.exited.set()
        if not self._ending:
            self.deaths.put_nowait(child)

    async def _exited(
        self, children: Sequence[Child], timeout_s: float, hurry: asyncio.Event
    ) -> None:
        """Wait until these have ended, the time is over, or somebody is in a hurry."""
        everyone = asyncio.gather(*(child.exited.wait() for child in children))
        hurried = asyncio.ensure_future(hurry.wait())
        try:
            waited: set[asyncio.Future[Any]] = {everyone, hurried}
            await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in (everyone, hurried):
                waiting.cancel()
            await asyncio.gather(everyone, hurried, return_exceptions=True)

    def _all_ended(self) -> bool:
        return all(child.status is not None for child in self.children)

    def _find(self) -> list[proc.Proc]:
        sessions = {child.popen.pid for child in self.children}
        found = {one.pid: one for one in members_of(self._plan.run_id)}
        found |= {one.pid: one for one in proc.everyone() if one.session in sessions}
        return list(found.values())

    def _left_of(self, dead: Child) -> list[proc.Proc]:
        """Return what still lives of a dead child: its session, and by tag what has left that."""
        found = {one.pid: one for one in of_process(self._plan.run_id, dead.name)}
        found |= {one.pid: one for one in proc.everyone() if one.session == dead.popen.pid}
        return list(found.values())

    def _let_go(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        stdout = child.popen.stdout
        if stdout is not None and not stdout.closed:
            self._on_output(child)
            loop.remove_reader(stdout.fileno())
            stdout.close()
        if child.pidfd >= 0:
            loop.remove_reader(child.pidfd)
            os.close(child.pidfd)
            child.pidfd = -1
        child.output.finish()
        if child.status is not None:
            child.popen.wait()

    def _on_log_trouble(self, text: str) -> None:
        # One full disk makes every log fail; one sentence is enough.
        if not self._told_about_logs:
            self._told_about_logs = True
            self._terminal.say(f"note: {text}; serving goes on, lines still appear here")


async def _cancelled(child: Child) -> None:
    """End the watching of a child's ranks."""
    if child.watch is not None:
        child.watch.cancel()
        await asyncio.gather(child.watch, return_exceptions=True)
        child.watch = None


def _signal_groups(children: Sequence[Child], number: signal.Signals) -> None:
    for child in children:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.popen.pid, number)

"""Starts workers again that die while a run serves, until it is told to stop. Decides no limit.

::

    serving ──death──▶ burying ──▶ pause ──▶ starting ──ready──▶ serving
       ▲                                        │
       └────────── next death ◀──── death, or not ready in time

A worker's restart owns one task; another death of the same worker replaces it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from trtllm_workers.deploy import report
from trtllm_workers.deploy.names import SERVICES
from trtllm_workers.deploy.output import Terminal
from trtllm_workers.deploy.plan import Plan, PlannedProcess
from trtllm_workers.deploy.ready import Ladder, climb
from trtllm_workers.deploy.restarts import Restart, Restarts
from trtllm_workers.deploy.site import Site
from trtllm_workers.deploy.supervise import Child, Supervisor
from trtllm_workers.errors import EngineDead
from trtllm_workers.observe.status import Status

# Ranks are found at once, or hidden from us; serving does not wait for them.
_WORLD_TIMEOUT_S = 1.0


class Reviver:
    """Keeps the workers of a ready run alive.

    ``recorded`` is called when the processes of the run have changed; ``pause`` waits so many seconds.
    A worker that ``site`` says is lost for good is given up while others of its role go on.
    """

    def __init__(
        self,
        plan: Plan,
        supervisor: Supervisor,
        terminal: Terminal,
        recorded: Callable[[], None],
        pause: Callable[[float], Awaitable[None]],
        site: Site | None = None,
    ) -> None:
        self._site = site or Site()
        self._given_up: set[str] = set()
        self._plan = plan
        self._supervisor = supervisor
        self._terminal = terminal
        self._recorded = recorded
        self._pause = pause
        self._restarts = Restarts(plan.max_restarts)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._rungs: dict[str, Ladder] = {}

    @property
    def any_restarted(self) -> bool:
        """Whether any worker died and was started again."""
        return any(self._restarts.total(one.name) for one in self._plan.processes)

    def step(self, planned: PlannedProcess) -> str:
        """Return the step a process has come to, in words."""
        rung = self._rungs.get(planned.name)
        if rung is None or rung.ready:
            return "ready"
        now_s = asyncio.get_running_loop().time()
        rung.observe(planned.name, self._site.read(planned.status), now_s)
        return rung.step(planned.name)

    def restarted_in_words(self, name: str) -> str:
        """Return how often a process was started again, "" when it never was."""
        total = self._restarts.total(name)
        if not total:
            return ""
        times = "once" if total == 1 else f"{total} times"
        return (
            f"it had been started again {times} (--max-restarts {self._restarts.limit} "
            "within 10 minutes)"
        )

    async def serve(self, stop: asyncio.Future[Any], fatal: Callable[[Child], Exception]) -> None:
        """Answer deaths until ``stop``. Raises ``fatal`` of the one that ends the run."""
        try:
            while not stop.done():
                await self._one_event(stop, fatal)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _one_event(
        self, stop: asyncio.Future[Any], fatal: Callable[[Child], Exception]
    ) -> None:
        death = asyncio.ensure_future(self._supervisor.deaths.get())
        waited: set[asyncio.Future[Any]] = {stop, death, *self._tasks.values()}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            death.cancel()
        for name, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[name]
                task.result()  # raises what ends the run
        if stop.done() or not death.done() or death.cancelled():
            return
        child = death.result()
        if earlier := self._tasks.pop(child.name, None):
            earlier.cancel()
            await asyncio.gather(earlier, return_exceptions=True)
        if child.plan.role in SERVICES:
            raise fatal(child)
        if lost := await self._site.lost(child.plan):
            self._require_others(child, fatal)
            self._tasks[child.name] = asyncio.create_task(self._give_up(child, lost))
            return
        restart = self._restarts.after_death(child.name, asyncio.get_running_loop().time())
        if restart is None:
            raise fatal(child)
        self._tasks[child.name] = asyncio.create_task(self._revive(child, restart))

    def _require_others(self, lost: Child, fatal: Callable[[Child], Exception]) -> None:
        """Raise ``fatal`` of a worker that is lost when no other of its role is left."""
        self._given_up.add(lost.name)
        left = [
            one
            for one in self._plan.processes
            if one.role == lost.plan.role and one.name not in self._given_up
        ]
        if not left:
            raise fatal(lost)

    async def _give_up(self, dead: Child, why: str) -> None:
        """Bury a worker that is lost for good; the others go on."""
        left = len(
            [
                one
                for one in self._plan.processes
                if one.role == dead.plan.role and one.name not in self._given_up
            ]
        )
        self._terminal.say(
            f"{dead.name} is lost: {why}\n"
            f"it is not started again; {left} {dead.plan.role} worker{'s' if left > 1 else ''} go"
            f"{'' if left > 1 else 'es'} on"
        )
        dead.output.log.write(f"\n--- {dead.name} is lost: {why} ---\n".encode())
        await self._supervisor.bury(dead)
        with suppress(OSError):
            dead.plan.status.unlink()
        self._recorded()

    async def _revive(self, dead: Child, restart: Restart) -> None:
        name, ending = dead.name, dead.ending()
        who = report.part(name, ending.rank, dead.plan.node_of(ending.rank or 0))
        how = report.exit_in_words(ending.status)
        pause = f" in {report.duration(restart.pause_s)}" if restart.pause_s else ""
        self._terminal.say(
            f"{who} {how}\n{name} is started again{pause} ({restart}); "
            f"its last lines stay in {dead.plan.log}"
        )
        # After its last lines in the log, before the first of its successor.
        dead.output.log.write(f"\n--- {who} {how}; {restart} ---\n".encode())
        if left := await self._supervisor.bury(dead):
            pids = ", ".join(str(one.pid) for one in left)
            raise EngineDead(
                f"{who} {how}, and processes that it left do not end even by KILL (pid {pids}); "
                "they may hold its GPU, so it is not started again"
            )
        # What the dead one said last must not make its successor look ready.
        with suppress(OSError):
            dead.plan.status.unlink()
        await self._pause(restart.pause_s)
        child = self._supervisor.start_again(dead)
        self._recorded()
        await self._become_ready(child, restart)

    async def _become_ready(self, child: Child, restart: Restart) -> None:
        """Wait until a worker is ready again; one that is not in time is ended, which is a death."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        ladder = self._rungs[child.name] = _OneRung({child.name: child.plan.role}, began_s)
        try:
            async with asyncio.timeout(self._plan.start_timeout_s):
                await climb(
                    ladder, {child.name: child.plan.status}, self._show_step, self._site.read
                )
        except TimeoutError:
            _, step, since_s = ladder.stuck(clock())
            self._terminal.say(
                f"{child.name} is not ready after {report.duration(self._plan.start_timeout_s)}: "
                f"stuck at '{step}' for {report.duration(since_s)}; it is ended"
            )
            self._supervisor.kill(child)
            return
        if child.world is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(child.world.complete.wait(), _WORLD_TIMEOUT_S)
        self._terminal.say(
            f"{child.name} is ready again after {report.duration(clock() - began_s)} ({restart})"
        )

    def _show_step(self, name: str, step: str) -> None:
        if name:
            self._terminal.line(name, step)
        else:
            self._terminal.say(step)


class _OneRung(Ladder):
    """The way of one worker alone: it does not know how many prefill workers there are."""

    def hopeless(self, name: str, status: Status | None) -> str | None:
        """Return None: a prefill worker that was refused may be the one that is being replaced."""
        return None

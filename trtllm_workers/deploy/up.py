"""The story of a run: make its folder, start, wait until ready, serve, end, clear up.

Knows how to tell it to the operator; what is started comes from the plan.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from trtllm_workers.deploy import guard, history, proc, report, resolved
from trtllm_workers.deploy.first_error import Death
from trtllm_workers.deploy.output import Terminal
from trtllm_workers.deploy.plan import Plan
from trtllm_workers.deploy.ready import PROBE, Ladder, climb, probe, probe_image
from trtllm_workers.deploy.revive import Reviver
from trtllm_workers.deploy.run import ProcessRecord, RunRecord, create_run
from trtllm_workers.deploy.site import Site
from trtllm_workers.deploy.supervise import Child, Supervisor
from trtllm_workers.errors import EXIT_INTERRUPTED, ConfigError, EngineDead, LaunchError, StartError
from trtllm_workers.observe.redact import Redactor, secret_values

# Before anything was ready there are no requests to wait for.
_START_GRACE_S = 5.0
# A process drains by itself for drain_timeout_s; then it still has to close its parts.
_CLOSE_GRACE_S = 5.0
_GUARD_TIMEOUT_S = 15.0
# Ranks are found at once, or hidden from us; serving does not wait for them.
_WORLD_TIMEOUT_S = 1.0


@dataclass(slots=True)
class _Asked:
    """What the operator asked for: the first signal stops, the second one hurries."""

    stop: asyncio.Future[signal.Signals]
    hurry: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, number: signal.Signals) -> None:
        if self.stop.done():
            self.hurry.set()
        else:
            self.stop.set_result(number)


async def run_plan(
    plan: Plan,
    environ: Mapping[str, str],
    terminal: Terminal,
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    site: Site | None = None,
) -> int:
    """Run a plan until it is told to stop; return the exit code (0, or 130 after Ctrl-C).

    Raises ConfigError (folders cannot be made), StartError (a part did not become ready) or
    EngineDead (a part died later, once too often) with the full report as message. Nothing of the
    run is left behind in any case, except logs that were asked for or that explain a death.
    ``pause`` waits some seconds before a worker is started again. ``site`` is where the processes live
    when that is not this host alone.
    """
    create_run(plan.folder)
    try:
        _make_log_dir(plan)
        with _Guard(plan) as watched_by, _Signals() as asked:
            story = _Story(plan, environ, terminal, asked, pause, watched_by, site or Site())
            return await story.tell()
    finally:
        # Kept logs were decided on by the story; whatever is left besides them goes.
        plan.folder.remove(keep_logs=True)


class _Story:
    def __init__(
        self,
        plan: Plan,
        environ: Mapping[str, str],
        terminal: Terminal,
        asked: _Asked,
        pause: Callable[[float], Awaitable[None]],
        watched_by: ProcessRecord,
        site: Site,
    ) -> None:
        self._plan = plan
        self._site = site
        self._environ = environ
        self._terminal = terminal
        self._asked = asked
        self._began_s = time.monotonic()
        self._supervisor = Supervisor(plan, environ, terminal, site)
        self._reviver = Reviver(plan, self._supervisor, terminal, self._note_processes, pause, site)
        self._ladder = Ladder(
            {one.name: one.role for one in plan.processes}, asyncio.get_running_loop().time()
        )
        self._record = RunRecord(
            run_id=plan.run_id,
            host=os.uname().nodename,
            boot_id=proc.boot_id(),
            started_at_s=time.time(),
            launcher=_record_of("launcher", os.getpid()),
            model=plan.model,
            http_host=plan.http_host,
            http_port=plan.http_port,
            discovery=plan.discovery,
            log_dir=str(plan.log_dir),
            drain_timeout_s=plan.drain_timeout_s,
            guard=watched_by,
            pid_namespace=proc.pid_namespace(),
        )
        self._culprit: Death | None = None
        self._failure: history.Failure | None = None
        self._ready = False
        self._trouble = "it was not asked yet"

    async def tell(self) -> int:
        failed = True
        watching = asyncio.create_task(self._watch_for_stop())
        try:
            self._note()
            self._note_resolved()
            await self._prepare()
            if not self._asked.stop.done():
                self._supervisor.start()
                self._note_processes()
                await self._become_ready()
                await self._serve()
            failed = False
        except LaunchError as error:
            self._failure = history.Failure(str(error), self._culprit)
            raise
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await self._end(failed)
        return EXIT_INTERRUPTED if self._asked.stop.result() is signal.SIGINT else 0

    async def _serve(self) -> None:
        watching = asyncio.create_task(self._site.watch(self._end_part))
        try:
            await self._reviver.serve(self._asked.stop, self._death)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def _end_part(self, name: str) -> None:
        with suppress(KeyError):
            self._supervisor.kill(self._supervisor.child(name))

    async def _watch_for_stop(self) -> None:
        await self._site.told_to_stop()
        self._asked.take(signal.SIGTERM)

    async def _prepare(self) -> None:
        """Let the site prepare other hosts. Returns early when asked to stop."""
        preparing = asyncio.ensure_future(self._site.prepare(self._terminal.say))
        waited: set[asyncio.Future[Any]] = {preparing, self._asked.stop}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if preparing.done():
                preparing.result()
        finally:
            preparing.cancel()
            await asyncio.gather(preparing, return_exceptions=True)

    async def _become_ready(self) -> None:
        """Climb the ladder. Returns early when asked to stop."""
        climbing = asyncio.ensure_future(self._climb())
        try:
            await self._either(climbing, timeout_s=self._plan.start_timeout_s)
        finally:
            climbing.cancel()
            with suppress(asyncio.CancelledError):
                await climbing

    async def _climb(self) -> None:
        files = {one.name: one.status for one in self._plan.processes}
        await climb(self._ladder, files, self._show_step, self._site.read)
        url = self._site.url(self._ladder.detail("ingress"))
        self._terminal.say(f"asking {self._plan.model} for one token")
        await probe(url, self._plan.model, self._on_probe_trouble)
        if self._plan.takes_images:
            self._terminal.say(f"asking {self._plan.model} about an image")
            refused = await probe_image(url, self._plan.model, self._on_probe_trouble)
            if refused:
                self._terminal.say(f"warning: {self._plan.model} takes no images here: {refused}")
        await self._supervisor.worlds_watched(_WORLD_TIMEOUT_S)
        self._ready = True
        self._note(state="ready", url=url)
        self._terminal.say(
            report.banner(
                run_id=self._plan.run_id,
                model=self._plan.model,
                url=url,
                took_s=time.monotonic() - self._began_s,
                log_dir=self._plan.log_dir,
                stop=self._site.manner_of_stopping,
                look=self._site.manner_of_looking,
            )
        )

    async def _either(self, work: asyncio.Future[None], timeout_s: float) -> None:
        """Wait for ``work``, a death (raises), the operator, or the time limit (raises)."""
        stop = self._asked.stop
        if stop.done():
            return
        death = asyncio.ensure_future(self._supervisor.deaths.get())
        waited: set[asyncio.Future[Any]] = {stop, death, work}
        try:
            done, _ = await asyncio.wait(
                waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            death.cancel()
        if death.done() and not death.cancelled():
            raise self._death(death.result())
        if not done:
            raise self._stuck(timeout_s)
        if work.done():
            work.result()

    async def _end(self, failed: bool) -> None:
        plan, asked = self._plan, self._asked
        self._note(state="stopping")
        grace_s = (plan.drain_timeout_s + _CLOSE_GRACE_S) if self._ready else _START_GRACE_S
        if asked.stop.done():
            self._terminal.say(_stopping(asked.stop.result(), self._ready, plan.drain_timeout_s))
        killed = await self._supervisor.end(grace_s, asked.hurry)
        if killed and not asked.hurry.is_set():
            names = " and ".join(killed)
            self._terminal.say(f"{names} did not end in time and had to be killed")
        await self._site.clear(self._terminal.say)
        explain = failed or self._reviver.any_restarted
        await asyncio.to_thread(
            history.keep,
            plan.folder,
            self._record,
            "failed" if failed else "stopped",
            self._failure,
            with_logs=explain,
        )
        kept = plan.folder.remove(keep_logs=explain and not plan.keeps_logs)
        if plan.keeps_logs or kept:
            self._terminal.say(f"logs are in {plan.log_dir}")

    def _note_resolved(self) -> None:
        """Write down what this run was told; it starts without that, too."""
        redactor = Redactor(secret_values(self._environ))
        with suppress(OSError):
            told = resolved.resolved_of(self._plan, redactor)
            self._plan.folder.resolved.write_bytes(
                msgspec.json.format(msgspec.json.encode(told), indent=1)
            )

    def _note_processes(self) -> None:
        records = {child.name: child.record() for child in self._supervisor.children}
        # One that waits to be started again stays on the list, as dead.
        known = {one.name: one for one in self._record.processes}
        names = [one.name for one in self._plan.processes]
        both = known | records
        self._note(processes=tuple(both[name] for name in names if name in both))

    def _note(self, **changes: object) -> None:
        self._record = msgspec.structs.replace(self._record, **changes)
        try:
            self._plan.folder.write(self._record)
        except OSError as wrong:
            self._terminal.say(
                f"note: cannot write {self._plan.folder.path}: {wrong.strerror}; "
                "'trtllm-launch ps' will know less about this run"
            )

    def _show_step(self, name: str, step: str) -> None:
        if name:
            self._terminal.line(name, step)
        else:
            self._terminal.say(step)

    def _on_probe_trouble(self, trouble: str) -> None:
        self._trouble = trouble

    def _death(self, child: Child) -> Exception:
        now_s = asyncio.get_running_loop().time()
        self._ladder.observe(child.name, self._site.read(child.plan.status), now_s)
        ending = child.ending()
        self._culprit = Death(child.name, ending.rank, report.exit_in_words(ending.status))
        text = report.death(
            child.name,
            ending.status,
            after_s=ending.lived_s,
            step=self._reviver.step(child.plan) if self._ready else self._ladder.step(child.name),
            restarted=self._reviver.restarted_in_words(child.name),
            lines=ending.lines,
            log=ending.log,
            rank=ending.rank,
            node=child.plan.node_of(ending.rank or 0),
        )
        return EngineDead(text) if self._ready else StartError(text)

    def _stuck(self, timeout_s: float) -> StartError:
        if self._ladder.ready:
            return StartError(
                f"not ready after {report.duration(timeout_s)}: every process is up, but the "
                f"{PROBE} got no answer: {self._trouble}"
            )
        name, step, since_s = self._ladder.stuck(asyncio.get_running_loop().time())
        child = self._supervisor.child(name)
        return StartError(
            report.stuck(
                name,
                step,
                since_s=since_s,
                timeout_s=timeout_s,
                lines=child.output.tail(),
                log=child.plan.log,
            )
        )


class _Guard:
    """Holds the pipe whose end tells the guard process that the launcher was killed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._popen: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ProcessRecord:
        plan = self._plan
        module = [sys.executable, "-P", "-m", guard.__name__]
        grace_s = str(min(plan.drain_timeout_s, _START_GRACE_S))
        self._popen = subprocess.Popen(
            [*module, plan.run_id, str(plan.folder.path), grace_s],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return _record_of("guard", self._popen.pid)

    def __exit__(self, kind: type[BaseException] | None, *_exc: object) -> None:
        assert self._popen is not None
        # A story with a foreseen end has ended every process; after anything else the guard does.
        foreseen = kind is None or issubclass(kind, LaunchError)
        try:
            self._popen.communicate(guard.DONE if foreseen else b"", timeout=_GUARD_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            self._popen.kill()  # it was stopped or is stuck; its work is done in any case
            self._popen.wait()


class _Signals:
    """SIGINT, SIGTERM and (unless ignored, as under nohup) SIGHUP ask the run to stop."""

    def __enter__(self) -> _Asked:
        self._loop = asyncio.get_running_loop()
        asked = _Asked(self._loop.create_future())
        wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        self._numbers = [one for one in wanted if signal.getsignal(one) is not signal.SIG_IGN]
        for number in self._numbers:
            self._loop.add_signal_handler(number, asked.take, number)
        return asked

    def __exit__(self, *_exc: object) -> None:
        for number in self._numbers:
            self._loop.remove_signal_handler(number)


def _stopping(number: signal.Signals, ready: bool, drain_timeout_s: float) -> str:
    who = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "the terminal was closed"}.get(
        number, number.name
    )
    if not ready:
        return f"{who}: stopping"
    again = "; Ctrl-C again ends them now" if number is signal.SIGINT else ""
    return f"{who}: stopping; running requests get up to {drain_timeout_s:g} s{again}"


def _record_of(name: str, pid: int) -> ProcessRecord:
    found = proc.read(pid)
    return ProcessRecord(
        name=name, role=name, pid=pid, start_ticks=found.start_ticks if found else 0
    )


def _make_log_dir(plan: Plan) -> None:
    try:
        plan.log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as wrong:
        raise ConfigError(
            f"cannot make the log folder {plan.log_dir}: {wrong.strerror or wrong}; "
            "choose another with --log-dir",
            param="log_dir",
        ) from wrong

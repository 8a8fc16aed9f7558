"""Shows and ends runs from outside the launcher: by run id, verified against /proc. Starts nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtllm_workers.config.spelling import nearest
from trtllm_workers.deploy import history, proc
from trtllm_workers.deploy.end import end_processes
from trtllm_workers.deploy.run import Run, find_runs
from trtllm_workers.deploy.shm import remove_left_overs
from trtllm_workers.errors import ConfigError

# The launcher drains, then kills, then clears up; it gets that long beyond its drain timeout.
_LAUNCHER_EXTRA_S = 25.0
# Two equal signals sent at once arrive as one.
_BETWEEN_SIGNALS_S = 0.3
_ORPHAN_GRACE_S = 5.0
_KILL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Stopped:
    """What ended, by name; ``killed`` needed KILL, ``left`` is still there (not ours to end)."""

    run_id: str
    ended: tuple[str, ...]
    killed: tuple[str, ...]
    left: tuple[str, ...]
    was_stale: bool


def choose_runs(runs: Sequence[Run], run_id: str | None, *, every: bool) -> list[Run]:
    """Return the runs that are meant. Raises ConfigError when that is not clear, naming the ids."""
    if every:
        return list(runs)
    ids = [run.run_id for run in runs]
    if run_id is None:
        if len(runs) > 1:
            raise ConfigError(
                f"several runs are there; say which: trtllm-launch stop {'|'.join(ids)}, "
                "or trtllm-launch stop --all",
                param="run_id",
            )
        return list(runs)
    chosen = [run for run in runs if run.run_id == run_id]
    if not chosen:
        near = nearest(run_id, ids)
        begun = [known for known in ids if run_id and known.startswith(run_id)]
        if len(begun) == 1:
            near = begun[0]
        listed = f"there {'is' if len(ids) == 1 else 'are'}: {', '.join(ids)}"
        hint = f"did you mean {near}?" if near else (listed if ids else "no run is there")
        raise ConfigError(f"unknown run '{run_id}'; {hint}", param="run_id")
    return chosen


def stop_run(run: Run, roots: Sequence[Path], *, hurry: bool = False) -> Stopped:
    """End a run: its launcher does it in order; what is left is ended here. Removes its folder.

    ``hurry`` skips the wait for running requests. Blocks, at most the run's drain timeout and some.
    """
    names = {process.pid: name for name, process in run.members.values()}
    launcher = run.launcher
    if launcher is not None:
        names[launcher.pid] = "launcher"
        _ask_launcher(run, launcher, hurry=hurry)
    killed: tuple[proc.Proc, ...] = ()
    left: tuple[proc.Proc, ...] = ()
    orphans = _still_there(run, roots, names)
    if orphans:
        grace_s = 0.0 if hurry else _ORPHAN_GRACE_S
        done = end_processes(lambda: _still_there(run, roots, names), grace_s, _KILL_WAIT_S)
        killed, left = done.on_kill, done.left
    if not left:
        remove_left_overs(run.run_id)
        if run.folder is not None:
            if launcher is None:  # else it has told its end itself
                history.keep(run.folder, run.record, "launcher died", with_logs=True)
            run.folder.remove()
    gone_badly = {process.pid for process in (*killed, *left)}
    return Stopped(
        run_id=run.run_id,
        ended=tuple(sorted({name for pid, name in names.items() if pid not in gone_badly})),
        killed=tuple(sorted(names[process.pid] for process in killed)),
        left=tuple(f"{names[process.pid]} (pid {process.pid})" for process in left),
        was_stale=not names,
    )


def _ask_launcher(run: Run, launcher: proc.Proc, *, hurry: bool) -> None:
    drain_s = run.record.drain_timeout_s if run.record else 0.0
    deadline = time.monotonic() + (0.0 if hurry else drain_s) + _LAUNCHER_EXTRA_S
    proc.send(launcher, signal.SIGTERM)
    proc.send(launcher, signal.SIGCONT)
    if hurry and proc.wait_gone([launcher], _BETWEEN_SIGNALS_S):
        proc.send(launcher, signal.SIGTERM)
    if proc.wait_gone([launcher], max(0.0, deadline - time.monotonic())):
        proc.send(launcher, signal.SIGKILL)
        proc.wait_gone([launcher], _KILL_WAIT_S)


def _still_there(run: Run, roots: Sequence[Path], names: dict[int, str]) -> list[proc.Proc]:
    """Look again: only now is known what the launcher's end has left."""
    for now in find_runs(roots):
        if now.run_id == run.run_id:
            names |= {process.pid: name for name, process in now.members.values()}
            return [process for _, process in now.members.values()]
    return [
        alive
        for _, process in run.members.values()
        if (alive := proc.same(process.pid, process.start_ticks))
    ]

"""Runs as rows for people and as values for machines. Reads /proc and status files; ends nothing."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from trtllm_workers.config.tables import table
from trtllm_workers.deploy import proc
from trtllm_workers.deploy.ready import step_in_words
from trtllm_workers.deploy.report import duration
from trtllm_workers.deploy.run import ProcessRecord, Run
from trtllm_workers.observe.status import read_status

_HEADER = ("RUN", "PROCESS", "PID", "ROLE", "STATE", "URL", "UPTIME", "RSS", "RESTARTS")
_PAIR_HEADER = ("RUN", "DECODE", "PREFILL", "TRANSPORT", "WIRE", "GB/S", "HANDOFFS", "STATE")


class PairRow(msgspec.Struct, frozen=True, kw_only=True):
    """One prefill worker that a decode worker takes KV blocks from; see ``PairStatus``."""

    peer: str
    transport: str
    wire: str
    state: str
    gb_per_s: float
    num_handoffs: int
    reason: str


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a run. ``pid`` 0: it has ended. ``uptime_s`` in seconds, ``rss_bytes`` of it alone.

    ``pairs`` is empty for all but a decode worker that runs. ``restarts`` counts how often it was started
    again after a death.
    """

    run_id: str
    process: str
    pid: int
    role: str
    state: str
    url: str = ""
    model: str = ""
    uptime_s: float = 0.0
    rss_bytes: int = 0
    log: str = ""
    pairs: tuple[PairRow, ...] = ()
    restarts: int = 0


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return a row for every recorded process and every other one that belongs to a run."""
    return [row for run in runs for row in _rows(run)]


def as_table(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """Return the rows for a terminal, with what to do about runs that lost their launcher."""
    if not rows:
        return "no run is there"
    lines = [
        (
            row.run_id,
            row.process,
            str(row.pid) if row.pid else "-",
            row.role,
            row.state,
            row.url or "-",
            duration(row.uptime_s) if row.pid else "-",
            f"{row.rss_bytes / 2**20:.0f} MiB" if row.pid else "-",
            str(row.restarts),
        )
        for row in rows
    ]
    hints = [
        f"run {run.run_id} lost its launcher; end what is left: trtllm-launch stop {run.run_id}"
        for run in runs
        if run.launcher is None
    ]
    parts = [table(_HEADER, lines), *_pair_table(rows), *hints]
    return "\n".join(parts)


def _pair_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        (
            row.run_id,
            row.process,
            pair.peer,
            pair.transport or "-",
            pair.wire or "-",
            f"{pair.gb_per_s:.2f}" if pair.gb_per_s else "-",
            str(pair.num_handoffs),
            f"{pair.state}: {pair.reason}" if pair.reason else pair.state,
        )
        for row in rows
        for pair in row.pairs
    ]
    return ["", table(_PAIR_HEADER, lines)] if lines else []


def _rows(run: Run) -> list[Row]:
    record = run.record
    recorded: list[ProcessRecord] = []
    rows = []
    if record is not None:
        recorded = list(record.processes)
        rows.append(_launcher_row(run))
    by_pid = dict(run.members)
    for one in recorded:
        found = by_pid.pop(one.pid, None)
        row = _row(run, one.name, one.role, found[1] if found else None, one.log)
        rows.append(msgspec.structs.replace(row, restarts=one.restarts))
        # mpiexec's helper has the worker's name, a rank one of its own.
        names = sorted((name, pid) for pid, (name, _) in by_pid.items() if _below(name, one.name))
        for name, pid in names:
            own = f"{name}'s child" if name == one.name else name
            rows.append(_row(run, own, "", by_pid.pop(pid)[1], ""))
    for name, process in by_pid.values():
        rows.append(_row(run, name, "", process, ""))
    return rows


def _below(name: str, recorded: str) -> bool:
    return name == recorded or name.startswith(f"{recorded} rank ")


def _launcher_row(run: Run) -> Row:
    assert run.record is not None
    process = run.launcher
    return Row(
        run_id=run.run_id,
        process="launcher",
        pid=process.pid if process else 0,
        role="launcher",
        state=run.record.state if process else "dead",
        model=run.record.model,
        uptime_s=process.uptime_s if process else 0.0,
        rss_bytes=process.rss_bytes if process else 0,
    )


def _row(run: Run, name: str, role: str, process: proc.Proc | None, log: str) -> Row:
    status = read_status(run.folder.status(name)) if run.folder else None
    state = "running"
    if process is None:
        state = "dead"
    elif status is not None and role:
        state = "listening" if status.step == "listening" else step_in_words(status)
    listening = status is not None and status.step == "listening" and process is not None
    return Row(
        run_id=run.run_id,
        process=name,
        pid=process.pid if process else 0,
        role=role or "-",
        state=state,
        url=status.detail if status is not None and listening else "",
        model=run.record.model if run.record else "",
        uptime_s=process.uptime_s if process else 0.0,
        rss_bytes=process.rss_bytes if process else 0,
        log=log,
        pairs=tuple(
            PairRow(**msgspec.structs.asdict(pair))
            for pair in (
                status.pairs if status is not None and process is not None and role else ()
            )
        ),
    )

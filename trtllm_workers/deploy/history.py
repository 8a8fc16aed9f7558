"""What stays of a run that has ended, so that runs can be compared and failures reported afterwards.

::

    <root>/history/<run id>/resolved.json    what it was told
                            facts/           what each process and rank saw around it
                            ended.json       how it ended, which transports were in use
                            first_error.txt  what went wrong first, when something did
                            logs/            beginning and end of each log, when something did

The last 20 runs are kept, each within a few MiB, readable by their owner alone. All of it is written
without secrets; a file that cannot be written is left out, because a run must be able to end.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec

from trtllm_workers.config.env import environment
from trtllm_workers.deploy import proc
from trtllm_workers.deploy.first_error import Death, FirstError, as_text, first_error
from trtllm_workers.deploy.run import HISTORY, RunFolder, RunRecord
from trtllm_workers.observe.redact import Redactor, secret_values
from trtllm_workers.observe.status import read_status

Outcome = Literal["stopped", "failed", "launcher died"]

KEPT_RUNS = 20
_MAX_BYTES = 64 << 20  # of all kept runs together
_HEAD_BYTES, _TAIL_BYTES = 32 << 10, 128 << 10
_MAX_LOGS_BYTES = 4 << 20  # of one run
_MAX_FACTS = 1024
_LARGEST_FACTS = 256 << 10
_LARGEST_SECRET = 4096
_RUN_ID = re.compile(r"[\w.-]{1,80}")


class PairInUse(msgspec.Struct, frozen=True, kw_only=True):
    """What moved KV blocks between two workers: what was agreed on, and what carried the bytes."""

    decode: str
    prefill: str
    transport: str
    wire: str


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """What ``ended.json`` holds. ``process`` and ``rank`` name the part whose death ended the run."""

    run_id: str
    host: str
    started_at_s: float
    ended_at_s: float
    outcome: Outcome
    model: str = ""
    process: str = ""
    rank: int | None = None
    how: str = ""
    report: str = ""
    pairs: tuple[PairInUse, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run failed: the report that the operator saw, and the death behind it, if there was one."""

    report: str
    death: Death | None = None


def redactor_of(folder: Path, record: RunRecord | None = None) -> Redactor:
    """Return what takes out the secrets of this environment, of a run's folder and of its processes."""
    values = secret_values(environment())
    for one in (record.launcher, *record.processes) if record and record.of_this_boot else ():
        if proc.same(one.pid, one.start_ticks):
            values |= secret_values(proc.variables(one.pid))
    folders = {folder / "discovery"}
    if record is not None and record.discovery.startswith("file:"):
        folders.add(Path(unquote(urlsplit(record.discovery).path)))
    for place in folders:
        # A namespace other than the default has a folder of its own below.
        for path in (*place.glob("secret"), *place.glob("*/secret")):
            with suppress(OSError):
                if path.stat().st_size <= _LARGEST_SECRET:
                    values.add(path.read_text(encoding="utf-8", errors="replace").strip())
    return Redactor(values)


def keep(
    folder: RunFolder,
    record: RunRecord | None,
    outcome: Outcome,
    failure: Failure | None = None,
    *,
    with_logs: bool = False,
) -> Path | None:
    """Keep what is worth keeping of an ended run, before its folder goes; drop the oldest of others.

    Returns where; None when nothing of it could be written. What was kept earlier of that run stays.
    """
    place = folder.history
    if record is None or place.exists() or _RUN_ID.fullmatch(folder.run_id) is None:
        return place if place.is_dir() else None
    draft = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(mode=0o700, exist_ok=True)
        draft.mkdir(mode=0o700)
        _fill(draft, folder, record, outcome, failure, with_logs=with_logs)
        draft.rename(place)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        return place if place.is_dir() else None
    prune(place.parent)
    return place


def _fill(
    draft: Path,
    folder: RunFolder,
    record: RunRecord,
    outcome: Outcome,
    failure: Failure | None,
    *,
    with_logs: bool,
) -> None:
    redactor = redactor_of(folder.path, record)
    with suppress(OSError):
        shutil.copyfile(folder.resolved, draft / "resolved.json")
    (draft / "facts").mkdir(mode=0o700)
    for path in sorted(folder.facts.glob("*.json"))[:_MAX_FACTS]:
        with suppress(OSError):
            if path.stat().st_size <= _LARGEST_FACTS:
                shutil.copyfile(path, draft / "facts" / path.name)
    death = failure.death if failure else None
    ended = Ended(
        run_id=record.run_id,
        host=record.host,
        started_at_s=record.started_at_s,
        ended_at_s=time.time(),
        outcome=outcome,
        model=record.model,
        process=death.process if death else "",
        rank=death.rank if death else None,
        how=death.how if death else "",
        report=redactor.text(failure.report) if failure else "",
        pairs=pairs_in_use(folder),
    )
    (draft / "ended.json").write_bytes(msgspec.json.format(msgspec.json.encode(ended), indent=1))
    if not with_logs:
        return
    logs = {name: redactor.text(text) for name, text in log_texts(record, _MAX_LOGS_BYTES).items()}
    (draft / "logs").mkdir(mode=0o700)
    for name, text in logs.items():
        (draft / "logs" / f"{name}.log").write_text(text, encoding="utf-8")
    (draft / "first_error.txt").write_text(as_text(first_of(logs, record.started_at_s, death)))


def first_of(
    logs: Mapping[str, str], began_s: float, death: Death | None = None
) -> FirstError | None:
    """Return the first error in whole texts of logs."""
    return first_error({name: text.splitlines() for name, text in logs.items()}, began_s, death)


def pairs_in_use(folder: RunFolder) -> tuple[PairInUse, ...]:
    """Return what decode workers last said of what moves their KV blocks."""
    found = []
    for path in sorted((folder.path / "status").glob("*.json")):
        status = read_status(path)
        for pair in status.pairs if status else ():
            found.append(
                PairInUse(
                    decode=path.stem, prefill=pair.peer, transport=pair.transport, wire=pair.wire
                )
            )
    return tuple(found)


def log_texts(record: RunRecord, max_bytes: int) -> dict[str, str]:
    """Return beginning and end of every log of a run, by process; ``max_bytes`` for all together."""
    logs = [(one.name, Path(one.log)) for one in record.processes if one.log]
    for name, path in list(logs):
        # srun's tasks have a log each beside that of their step.
        for own in sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*{path.suffix}")):
            logs.append((name + own.stem.removeprefix(path.stem), own))
    share = max_bytes // max(1, len(logs))
    head = min(_HEAD_BYTES, share // 4)
    found = {}
    for name, path in logs:
        text = head_and_tail(path, head, min(_TAIL_BYTES, share - head))
        if text is not None:
            found[name] = text
    return found


def head_and_tail(path: Path, head_bytes: int, tail_bytes: int) -> str | None:
    """Return a file's text; of a long one whole lines of beginning and end. None: cannot be read."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= head_bytes + tail_bytes:
                return file.read(head_bytes + tail_bytes).decode("utf-8", "replace")
            head = file.read(head_bytes).rpartition(b"\n")[0]
            file.seek(size - tail_bytes)
            tail = file.read(tail_bytes).partition(b"\n")[2]
    except OSError:
        return None
    left_out = size - len(head) - len(tail)
    text = b"\n".join([head, f"[… {left_out} bytes left out …]".encode(), tail])
    return text.decode("utf-8", "replace")


def read_ended(path: Path) -> Ended | None:
    """Return how a run ended; None when that was not kept."""
    try:
        return msgspec.json.decode((path / "ended.json").read_bytes(), type=Ended)
    except (OSError, msgspec.DecodeError):
        return None


def past_runs(roots: Iterable[Path]) -> list[Path]:
    """Return the folders of ended runs, the latest first."""
    found: list[tuple[float, Path]] = []
    for root in roots:
        with suppress(OSError):
            for path in (root / HISTORY).iterdir():
                if not path.name.startswith(".") and path.is_dir():
                    found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def prune(history: Path, kept_runs: int = KEPT_RUNS, max_bytes: int = _MAX_BYTES) -> None:
    """Remove the oldest runs beyond so many, or beyond so many bytes; the latest always stays."""
    used = 0
    for index, path in enumerate(past_runs([history.parent])):
        used += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if index and (index >= kept_runs or used > max_bytes):
            shutil.rmtree(path, ignore_errors=True)
    _drop_drafts(history)


def _drop_drafts(history: Path) -> None:
    """Remove what processes of this host left unfinished."""
    with suppress(OSError):
        for path in history.glob(".*.tmp"):
            pid = path.name.removesuffix(".tmp").rpartition(".")[2]
            old = time.time() - path.stat().st_mtime > 3600
            if old and not Path("/proc", pid).exists():
                shutil.rmtree(path, ignore_errors=True)

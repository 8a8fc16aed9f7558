"""Which process of a run failed first, and what it said first about it. Pure: lines in, text out.

The first death counts: every other process fails because of it. Deaths are known from the launcher, and
from the lines that it writes into a log between two lives of a worker. Where nothing died, the earliest
error line of all logs counts. Lines of our own carry a time; others have that of the line before.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_CONSOLE = re.compile(
    r"^(\d\d):(\d\d):(\d\d)\.(\d{3}) (debug|info|warning|error|critical) +(\S.*?)  "
)
_LABEL = re.compile(r"^(?:\[(\d+)\]|(\d+):) ")  # mpiexec -l, srun --label
_RANK = re.compile(r"\brank (\d+)")
_LIFE_ENDS = re.compile(
    r"^--- (?P<who>.+?) (?P<how>(?:was killed by|ended with) .*); (?P<rest>.*) ---$"
)
_OF_RANK = re.compile(r"^rank (\d+) of (.+)$")
_FATAL = re.compile(
    r"^Traceback \(most recent call last\)|^Fatal Python error|Segmentation fault|^terminate called"
    r"|CUDA (?:error|out of memory|driver error)|OutOfMemoryError|\[TRT-LLM\] \[(?:E|F)\]|UCX +(?:ERROR|FATAL)"
    r"|NCCL (?:error|failure)|^Abort\(\d+\)|MPI_ABORT was invoked|^srun: error:|mpirun noticed that process"
    r"|\b[Bb]us error\b|[Oo]ut of memory|\boom-kill|^(?:[A-Za-z_][\w.]*)?(?:Error|Exception): "
    r"|trtllm-launch: .*(?:error|cannot|failed)"
)
_DAY_S = 86400.0
# An error long before the death is another one.
_LOOK_BACK_LINES = 400
_BEFORE, _AFTER = 5, 25


@dataclass(frozen=True, slots=True)
class Death:
    """How a process, or a ``rank`` of it, ended; ``how`` is the end of a sentence."""

    process: str
    rank: int | None
    how: str


@dataclass(frozen=True, slots=True)
class FirstError:
    """The first error: whose, when (Unix time; None: unknown), where, and the lines around it.

    ``line`` counts from 1 in the log of ``process``; 0: it wrote nothing. Without ``told`` no line
    speaks of an error, and ``lines`` are its last.
    """

    process: str
    rank: int | None
    time_s: float | None
    line: int
    how: str
    lines: tuple[str, ...]
    told: bool = True

    @property
    def who(self) -> str:
        """Name the process, and its rank."""
        return self.process if self.rank is None else f"{self.process} rank {self.rank}"


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    time_s: float | None
    rank: int | None
    level: str

    @property
    def is_error(self) -> bool:
        return self.level in ("error", "critical") or self.is_fatal

    @property
    def is_fatal(self) -> bool:
        return self.level == "critical" or (not self.level and bool(_FATAL.search(self.text)))


def first_error(
    logs: Mapping[str, Sequence[str]], began_s: float = 0.0, died: Death | None = None
) -> FirstError | None:
    """Return the first error of a run; None when nothing died and no log holds one.

    ``logs`` holds the lines of each process, ``died`` the death that ended the run, ``began_s`` the Unix
    time of its start: console lines tell no day.
    """
    parsed = {name: _parse(lines, began_s) for name, lines in logs.items()}
    deaths = [death for name, lines in parsed.items() for death in _deaths_in(name, lines)]
    if deaths:
        _, name, at, death = min(deaths, key=lambda one: (one[0], one[1]))
        if own := _of_rank_alone(parsed, death):
            return _of_death(death, own, len(own))
        return _of_death(death, parsed[name], at)
    if died is not None:
        lines = _of_rank_alone(parsed, died) or parsed.get(died.process, [])
        return _of_death(died, lines, len(lines))
    errors = [
        (line.time_s if line.time_s is not None else float("inf"), name, at)
        for name, lines in parsed.items()
        for at, line in enumerate(lines)
        if line.is_error
    ]
    if not errors:
        return None
    _, name, at = min(errors)
    found = parsed[name][at]
    return FirstError(name, found.rank, found.time_s, at + 1, "", _around(parsed[name], at))


def rank_log_name(process: str, rank: int) -> str:
    """Return what the log of a rank alone is called; under srun each rank has one."""
    return f"{process}.rank{rank}"


def _of_rank_alone(parsed: Mapping[str, list[_Line]], death: Death) -> list[_Line]:
    return [] if death.rank is None else parsed.get(rank_log_name(death.process, death.rank), [])


def as_text(found: FirstError | None) -> str:
    """Return the first error for people."""
    if found is None:
        return "no process died, and no log holds an error\n"
    when = ""
    if found.time_s is not None:
        when = dt.datetime.fromtimestamp(found.time_s, dt.UTC).strftime(" at %Y-%m-%d %H:%M:%S UTC")
    head = [f"first error: {found.who}{when}"]
    if found.how:
        head.append(f"it {found.how}")
    if not found.line:
        head.append("it wrote nothing")
    elif found.told:
        head.append(f"line {found.line} of its log:")
    else:
        head.append(f"it said nothing of an error; its last lines, from line {found.line}:")
    return "\n".join([*head, *(f"  | {line}" for line in found.lines)]) + "\n"


def _deaths_in(name: str, lines: Sequence[_Line]) -> list[tuple[float, str, int, Death]]:
    found = []
    for at, line in enumerate(lines):
        if ended := _LIFE_ENDS.match(line.text):
            of_rank = _OF_RANK.match(ended["who"])
            rank = int(of_rank[1]) if of_rank else None
            time_s = line.time_s if line.time_s is not None else float("inf")
            found.append((time_s, name, at, Death(name, rank, ended["how"])))
    return found


def _of_death(death: Death, lines: Sequence[_Line], end: int) -> FirstError:
    """Return what the dead one said first about its end, which stands before line ``end``."""
    begin = max(0, end - _LOOK_BACK_LINES)
    for at in range(begin, end):
        if _LIFE_ENDS.match(lines[at].text):
            begin = at + 1
    life = range(begin, end)
    mine = [at for at in life if death.rank is None or lines[at].rank in (None, death.rank)]
    for wanted in (
        [at for at in mine if lines[at].is_fatal],
        [at for at in mine if lines[at].is_error],
        [at for at in life if lines[at].is_error],
    ):
        if wanted:
            at = wanted[0]
            shown = tuple(
                line.text for line in lines[max(begin, at - _BEFORE) : min(end, at + _AFTER)]
            )
            return FirstError(death.process, death.rank, lines[at].time_s, at + 1, death.how, shown)
    last = lines[max(begin, end - _BEFORE * 4) : end]
    return FirstError(
        death.process,
        death.rank,
        last[-1].time_s if last else None,
        end - len(last) + 1 if last else 0,
        death.how,
        tuple(line.text for line in last),
        told=False,
    )


def _around(lines: Sequence[_Line], at: int) -> tuple[str, ...]:
    return tuple(line.text for line in lines[max(0, at - _BEFORE) : at + _AFTER])


def _parse(lines: Sequence[str], began_s: float) -> list[_Line]:
    parsed: list[_Line] = []
    last_s: float | None = None
    for raw in lines:
        text = raw.rstrip("\r\n")
        rank = None
        if label := _LABEL.match(text):
            rank, text = int(label[1] or label[2]), text[label.end() :]
        time_s, level, process = _stamp(text, last_s if last_s is not None else began_s)
        last_s = time_s if time_s is not None else last_s
        if rank is None and (named := _RANK.search(process)):
            rank = int(named[1])
        parsed.append(_Line(text, last_s, rank, level))
    return parsed


def _stamp(text: str, not_before_s: float) -> tuple[float | None, str, str]:
    """Return time, level and process of a line of our own format; None and "" of another's."""
    if text.startswith("{"):
        try:
            event = json.loads(text)
            time_s = dt.datetime.fromisoformat(str(event["time"])).timestamp()
            return time_s, str(event["level"]), str(event.get("process", ""))
        except (ValueError, KeyError, TypeError):
            return None, "", ""
    found = _CONSOLE.match(text)
    if found is None:
        return None, "", ""
    hour, minute, second, milli = (int(part) for part in found.groups()[:4])
    time_s = not_before_s // _DAY_S * _DAY_S + hour * 3600 + minute * 60 + second + milli / 1000
    # Lines of two threads may swap a moment; half a day back is midnight that has passed.
    if time_s < not_before_s - _DAY_S / 2:
        time_s += _DAY_S
    return time_s, found[5], found[6]

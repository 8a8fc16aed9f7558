"""A batch job as the text of its script for ``sbatch``. Pure.

How SLURM reads a ``#SBATCH`` line, as seen with 22.05: a ``#`` outside quotes ends it without a word; in
single and in double quotes a backslash takes the next character as it is; nothing else is special, not
even ``$``. No way is left to write a line break. Directives end at the first line that is no comment.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Final

from trtllm_workers.deploy.slurm.answers import seconds
from trtllm_workers.errors import ConfigError

_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:@%+,=\[\]-]+")
_FLAG: Final = re.compile(r"--[a-z][a-z0-9-]*(=.*)?", re.DOTALL)
# SLURM writes further things for a %; a path that has one by chance would lead elsewhere.
_PATTERN: Final = re.compile(r"%[jxAa]")
_NO_LIMIT: Final = ("infinite", "UNLIMITED")
_MAX_SIGNAL_S: Final = 65_535  # SLURM's own


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One job: ``words`` run on its first node, in place of the batch script's shell.

    ``gpu_flags`` and ``extra`` are whole flags, ``--name`` or ``--name=value``. ``output`` is a path in
    which %j stands for the job's id, %x for its name, %A and %a for those of an array. ``chdir`` and
    ``output`` are absolute. ``signal_before_end_s`` sends TERM to ``words`` that long before the time
    limit, or up to a minute earlier, which is as exact as SLURM is.
    """

    name: str
    words: tuple[str, ...]
    num_nodes: int = 1
    gpu_flags: tuple[str, ...] = ()
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    time_limit: str | None = None
    output: str | None = None
    chdir: str | None = None
    no_kill: bool = False
    no_requeue: bool = False
    signal_before_end_s: int | None = None
    extra: tuple[str, ...] = ()


def sbatch_text(job: BatchJob) -> str:
    """Return the script to hand to ``sbatch``.

    Raises ConfigError for what SLURM could not take as it is meant, rather than let it be cut.
    """
    flags = _flags(job)
    if not job.words:
        raise ConfigError("a batch job without a command: give the words to run")
    for word in job.words:
        if "\0" in word or "\r\n" in word:
            raise ConfigError(
                f"{word!r}: sbatch refuses a script with NUL or DOS line breaks in it"
            )
    # With exec the signal before the end reaches the command itself: a shell that waits for one in
    # the foreground would sit on it until the command ends.
    return "\n".join(
        [
            "#!/bin/sh",
            *(f"#SBATCH {directive(flag)}" for flag in flags),
            f"exec {shlex.join(job.words)}",
            "",
        ]
    )


def directive(flag: str) -> str:
    """Return a flag as SLURM reads it back from a ``#SBATCH`` line."""
    if not _FLAG.fullmatch(flag):
        raise ConfigError(f"{flag!r} is no flag of sbatch: write --name or --name=value")
    name, is_given, value = flag.partition("=")
    if any(ord(one) < 32 or ord(one) == 127 for one in value):
        raise ConfigError(
            f"{flag!r}: a directive of sbatch takes no line breaks or other control characters"
        )
    if not is_given or _PLAIN.fullmatch(value):
        return flag
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def _flags(job: BatchJob) -> list[str]:
    """Return all flags of a job, each named once."""
    if not job.name.strip():
        raise ConfigError("a batch job without a name: SLURM would call it after a temporary file")
    if job.num_nodes < 1:
        raise ConfigError(f"a batch job on {job.num_nodes} nodes: it needs at least one")
    flags = [f"--job-name={job.name}", f"--nodes={job.num_nodes}", *job.gpu_flags]
    for name, value in (("account", job.account), ("partition", job.partition), ("qos", job.qos)):
        if value is not None:
            flags.append(f"--{name}={_chosen(name, value)}")
    if job.time_limit is not None:
        flags.append(f"--time={_time(job.time_limit)}")
    if job.output is not None:
        flags.append(f"--output={_output(job.output)}")
    if job.chdir is not None:
        flags.append(f"--chdir={_absolute('chdir', job.chdir)}")
    flags += ["--no-kill"] * job.no_kill + ["--no-requeue"] * job.no_requeue
    if job.signal_before_end_s is not None:
        flags.append(f"--signal=B:TERM@{_signal(job.signal_before_end_s)}")
    flags += job.extra
    seen: set[str] = set()
    for flag in flags:
        name = flag.partition("=")[0]
        if name in seen:
            raise ConfigError(
                f"{name} is given twice, SLURM would take one of them: {', '.join(flags)}"
            )
        seen.add(name)
    return flags


def _chosen(name: str, value: str) -> str:
    if not value.strip() or any(one.isspace() for one in value):
        raise ConfigError(f"--{name}: {value!r} is no name that SLURM knows", param=name)
    return value


def _time(limit: str) -> str:
    if limit not in _NO_LIMIT and seconds(limit) is None:
        raise ConfigError(
            f"--time {limit!r}: write minutes, HH:MM:SS or DAYS-HH:MM:SS", param="time_limit"
        )
    return limit


def _output(path: str) -> str:
    # SLURM writes %% in its own way from version to version, so a literal % cannot be had.
    if "%" in _PATTERN.sub("", path) or "\\" in path:
        raise ConfigError(
            f"--output {path}: SLURM would read its % or \\ as something else; only %j, %x, %A and %a "
            "may stand there, so choose a folder without them",
            param="output",
        )
    return _absolute("output", path)


def _absolute(name: str, path: str) -> str:
    if not path.startswith("/"):
        raise ConfigError(f"--{name} {path}: give an absolute path", param=name)
    return path


def _signal(before_end_s: int) -> int:
    if not 0 < before_end_s <= _MAX_SIGNAL_S:
        raise ConfigError(
            f"signal {before_end_s} s before the end: SLURM takes 1 to {_MAX_SIGNAL_S}",
            param="signal_before_end_s",
        )
    return before_end_s

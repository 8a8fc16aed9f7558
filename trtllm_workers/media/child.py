"""``python -m trtllm_workers.media.child KIND FD PARENT_PID``: opens what strangers sent, within limits.

A decoder's bug, or a file that is a bomb, takes this process and nothing else with it. It has no
environment to speak of, no open file but its socket and a job's, no network and no way to start or touch
other processes, a bounded memory and bounded processor time, a low priority, and dies with the worker
that started it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

import msgspec

from trtllm_workers.media.jobs import (
    MAX_MESSAGE_BYTES,
    Job,
    Kind,
    Ready,
    Refused,
    Reply,
    Unusable,
    Why,
)
from trtllm_workers.media.seccomp import give_up

Handler = Callable[[Job, list[int]], Reply]

_PR_SET_PDEATHSIG = 1
_NICE = 10
_MOST_FILES = 64
_MOST_FDS = 4
_LONGEST_DETAILS = 500


def main(arguments: list[str]) -> None:
    """Do jobs until the worker closes the socket."""
    kind, fd, parent, extra_bytes = Kind(arguments[0]), *map(int, arguments[1:4])
    _die_with(parent)
    os.nice(_NICE)
    channel = socket.socket(fileno=fd)
    try:
        handler = _handler(kind)
    except (ImportError, OSError) as error:
        channel.send(msgspec.msgpack.encode(Unusable(repr(error)[:_LONGEST_DETAILS])))
        return
    _limit(extra_bytes)
    give_up()
    channel.send(msgspec.msgpack.encode(Ready()))
    jobs = msgspec.msgpack.Decoder(Job)
    while True:
        message, fds, _flags, _address = socket.recv_fds(channel, MAX_MESSAGE_BYTES, _MOST_FDS)
        if not message:
            return
        try:
            job = jobs.decode(message)
            _limit_cpu(job.cpu_s)
            reply = _answer(handler, job, fds)
        finally:
            for one in fds:
                os.close(one)
        channel.send(msgspec.msgpack.encode(reply))


def _answer(handler: Handler, job: Job, fds: list[int]) -> Reply:
    try:
        return handler(job, fds)
    except MemoryError:
        return Refused(Why.MEMORY)
    except Exception as error:  # noqa: BLE001 (a border: whatever a decoder raises is the file's fault)
        return Refused(Why.BROKEN, repr(error)[:_LONGEST_DETAILS])


def _handler(kind: Kind) -> Handler:
    if kind is Kind.IMAGES:
        from trtllm_workers.media.child_images import handle as images

        return images
    from trtllm_workers.media.child_pickles import handle as pickles

    return pickles


def _die_with(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        raise SystemExit(0)


def _limit(extra_bytes: int) -> None:
    """Bound memory to what is mapped now and ``extra_bytes`` more; forbid files and core dumps."""
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    _bound(resource.RLIMIT_AS, mapped + extra_bytes)
    _bound(resource.RLIMIT_FSIZE, 0)
    _bound(resource.RLIMIT_CORE, 0)
    _bound(resource.RLIMIT_NOFILE, _MOST_FILES)
    # Should the machine run out of memory, this process goes first.
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _limit_cpu(cpu_s: float) -> None:
    # The hard limit stays, so that the next job can have its own.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = int(usage.ru_utime + usage.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds if hard < 0 else min(seconds, hard), hard))


def _bound(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    if 0 <= hard < value:
        value = hard
    resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main(sys.argv[1:])

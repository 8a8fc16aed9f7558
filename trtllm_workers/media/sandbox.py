"""Children that open what strangers sent: started when first needed, kept warm, ended when in doubt.

One job at a time for a child. A child that did not answer in time, that broke off, or whose job was
cancelled is killed; so is one that has done many jobs, and what a job left behind goes with it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from trtllm_workers.config.env import environment
from trtllm_workers.errors import Overloaded, Unavailable
from trtllm_workers.media.jobs import MAX_MESSAGE_BYTES, Job, Kind, Ready, Refused, Reply
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

_MODULE = "trtllm_workers.media.child"
_START_TIMEOUT_S = 60.0
_MOST_JOBS = 200
# What a child may know of this process's environment: where programs and libraries are.
_PASSED_ON = ("LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TMPDIR")
_SET = {"CUDA_VISIBLE_DEVICES": "", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class ChildFailed(Exception):
    """A child gave no answer, or not one to its job; for the log."""


class TimedOut(ChildFailed):
    """A child did not answer in time."""


@dataclass(eq=False, slots=True)
class _Child:
    process: asyncio.subprocess.Process
    channel: socket.socket
    num_jobs: int = 0


class Sandbox:
    """At most ``max_children`` children of one kind, each with ``memory_bytes`` to work in.

    Belongs to one event loop. ``close`` ends all children; it is safe twice.
    """

    def __init__(
        self, kind: Kind, *, max_children: int, memory_bytes: int, wait_timeout_s: float
    ) -> None:
        self._kind = kind
        self._memory_bytes = memory_bytes
        self._wait_timeout_s = wait_timeout_s
        self._turns = asyncio.Semaphore(max_children)
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._closed = False
        self._replies = msgspec.msgpack.Decoder(Reply)

    @property
    def pids(self) -> list[int]:
        """The children that run."""
        return [child.process.pid for child in (*self._idle, *self._busy)]

    async def run(
        self, job: Job, fds: Sequence[int], expected: type[T], timeout_s: float
    ) -> T | Refused:
        """Have a job done within ``timeout_s`` of a child's time; descriptors stay the caller's.

        Raises ChildFailed; Overloaded when no child is free in time; Unavailable when none can work here.
        """
        try:
            async with asyncio.timeout(self._wait_timeout_s):
                await self._turns.acquire()
        except TimeoutError as error:
            raise Overloaded(
                "too many images and files are being opened on this worker; try again later"
            ) from error
        try:
            child = await self._given(job, fds)
            reply = None
            try:
                reply = await self._answer(child, timeout_s)
            finally:
                self._busy.discard(child)
                fit = isinstance(reply, expected | Refused) and child.num_jobs < _MOST_JOBS
                if fit and not self._closed:
                    self._idle.append(child)
                else:
                    await self._end(child)
        finally:
            self._turns.release()
        if not isinstance(reply, expected | Refused):
            raise ChildFailed(f"another answer than expected: {type(reply).__name__}")
        return reply

    async def close(self) -> None:
        self._closed = True
        while self._idle:
            self._begin_end(self._idle.pop())
        busy = list(self._busy)
        for child in busy:  # whoever waits for its answer gets ChildFailed
            with suppress(ProcessLookupError):
                child.process.kill()
        for child in busy:
            await child.process.wait()
        if self._ending:
            await asyncio.wait(self._ending)

    # -------------------------------------------------------------------------------------------

    async def _given(self, job: Job, fds: Sequence[int]) -> _Child:
        """Return a child that has been given the job."""
        message = msgspec.msgpack.encode(job)
        while self._idle:
            child = self._idle.pop()
            if self._give(child, message, fds):
                return child
            await self._end(child)  # it died while it had nothing to do
        child = await self._start()
        if not self._give(child, message, fds):
            await self._end(child)
            raise ChildFailed("it ended before its first job")
        return child

    def _give(self, child: _Child, message: bytes, fds: Sequence[int]) -> bool:
        try:
            socket.send_fds(child.channel, [message], list(fds))
        except OSError:
            return False
        child.num_jobs += 1
        self._busy.add(child)
        return True

    async def _answer(self, child: _Child, timeout_s: float) -> Reply:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                message = await loop.sock_recv(child.channel, MAX_MESSAGE_BYTES)
        except TimeoutError as error:
            raise TimedOut(f"no answer within {timeout_s:g} s") from error
        except OSError as error:
            raise ChildFailed(f"it ended in the middle of its job: {error}") from error
        if not message:
            raise ChildFailed("it ended in the middle of its job")
        try:
            reply: Reply = self._replies.decode(message)
        except msgspec.DecodeError as error:
            raise ChildFailed("an answer that is none") from error
        return reply

    async def _start(self) -> _Child:
        if self._closed:
            raise Unavailable("this worker ends")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        known = environment()
        child = None
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", _MODULE, self._kind, str(theirs.fileno())),
                    *(str(os.getpid()), str(self._memory_bytes)),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env={name: known[name] for name in _PASSED_ON if name in known} | _SET,
                )
            child = _Child(process, ours)
            self._busy.add(child)
            reply = await self._answer(child, _START_TIMEOUT_S)
        except BaseException:
            if child is None:
                ours.close()
            else:
                await self._end(child)
            raise
        if not isinstance(reply, Ready):
            await self._end(child)
            log.error("a child for media does not work here", kind=self._kind, reply=repr(reply))
            raise Unavailable("this worker cannot open such files now")
        self._busy.discard(child)
        log.debug("a child for media is ready", kind=self._kind, pid=child.process.pid)
        return child

    async def _end(self, child: _Child) -> None:
        """Kill a child; return when it is gone, or at once when cancelled: it goes all the same."""
        await asyncio.shield(self._begin_end(child))

    def _begin_end(self, child: _Child) -> asyncio.Task[None]:
        self._busy.discard(child)
        child.channel.close()
        with suppress(ProcessLookupError):
            child.process.kill()
        task = asyncio.create_task(_gone(child.process))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task


async def _gone(process: asyncio.subprocess.Process) -> None:
    code = await process.wait()
    log.debug("a child for media has ended", pid=process.pid, code=code)

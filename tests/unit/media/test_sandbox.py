from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from tests.unit.media.support import png
from trtllm_workers.errors import Overloaded, Unavailable
from trtllm_workers.media import sandbox as module
from trtllm_workers.media.descriptors import in_memory, room_in_memory
from trtllm_workers.media.jobs import Decode, Decoded, Kind, Look, Looked, Refused, Why
from trtllm_workers.media.sandbox import ChildFailed, Sandbox, TimedOut

MIB = 1 << 20
LOOK = Look(1 << 20, 10.0)
TIMEOUT_S = 20.0


@asynccontextmanager
async def running(memory_bytes: int = 256 * MIB, max_children: int = 1) -> AsyncIterator[Sandbox]:
    sandbox = Sandbox(
        Kind.IMAGES, max_children=max_children, memory_bytes=memory_bytes, wait_timeout_s=TIMEOUT_S
    )
    try:
        yield sandbox
    finally:
        pids = sandbox.pids
        await sandbox.close()
        await sandbox.close()
        assert not any(map(exists, pids))


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@contextmanager
def pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


async def ended(process: int) -> None:
    """Return when the process of this descriptor has ended."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process, over.set)
    try:
        await asyncio.wait_for(over.wait(), 10)
    finally:
        loop.remove_reader(process)


async def look(sandbox: Sandbox, content: bytes, timeout_s: float = TIMEOUT_S) -> Looked | Refused:
    with in_memory() as source:
        source.write(content)
        return await sandbox.run(LOOK, [source.fd], Looked, timeout_s)


def read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def facts(pid: int, name: str) -> dict[str, str]:
    lines = read(pid, name).splitlines()
    if name == "limits":
        return {line[:26].strip(): line[26:47].strip() for line in lines}
    return {line.split(":")[0]: line.split(":", 1)[1].strip() for line in lines}


async def test_a_child_is_kept_warm_and_bounded() -> None:
    async with running() as sandbox:
        assert sandbox.pids == []
        assert await look(sandbox, png(4, 3)) == Looked(3, 4, 1)
        [pid] = sandbox.pids
        assert await look(sandbox, png(4, 3)) == Looked(3, 4, 1)
        assert sandbox.pids == [pid]
        limits = facts(pid, "limits")
        assert 256 * MIB < int(limits["Max address space"]) < 2048 * MIB
        assert limits["Max file size"] == limits["Max core file size"] == "0"
        assert int(limits["Max open files"]) == 64
        assert int(limits["Max cpu time"]) < 20
        status = facts(pid, "status")
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert os.getpriority(os.PRIO_PROCESS, pid) == 10
        assert read(pid, "oom_score_adj") == "1000\n"


async def test_a_child_knows_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with in_memory() as ours:
        os.set_inheritable(ours.fd, True)
        async with running() as sandbox:
            await look(sandbox, png())
            [pid] = sandbox.pids
            assert "PATH=" in read(pid, "environ")
            assert "secret" not in read(pid, "environ")
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    assert sorted(link.split(":")[0] for link in links) == ["/dev/null"] * 3 + ["socket"]


async def stopped(sandbox: Sandbox) -> int:
    """Make the one child stop, so that it answers nothing."""
    assert isinstance(await look(sandbox, png()), Looked)
    [pid] = sandbox.pids
    os.kill(pid, signal.SIGSTOP)
    return pid


async def test_a_child_that_does_not_answer_in_time_is_killed_and_replaced() -> None:
    async with running() as sandbox:
        pid = await stopped(sandbox)
        with pytest.raises(TimedOut):
            await look(sandbox, png(), timeout_s=0.1)
        assert not exists(pid)
        assert isinstance(await look(sandbox, png()), Looked)
        assert sandbox.pids != [pid]


async def test_a_cancelled_job_takes_its_child_with_it() -> None:
    async with running() as sandbox:
        pid = await stopped(sandbox)
        task = asyncio.create_task(look(sandbox, png()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not exists(pid)
        assert sandbox.pids == []
        assert isinstance(await look(sandbox, png()), Looked)


async def test_a_child_that_dies_in_its_job() -> None:
    async with running() as sandbox:
        pid = await stopped(sandbox)
        task = asyncio.create_task(look(sandbox, png()))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ChildFailed, match="middle"):
            await task
        assert isinstance(await look(sandbox, png()), Looked)


async def test_a_child_that_died_while_idle_is_nobodys_fault() -> None:
    async with running() as sandbox:
        await look(sandbox, png())
        [pid] = sandbox.pids
        with pidfd(pid) as process:
            os.kill(pid, signal.SIGKILL)
            await ended(process)
        assert isinstance(await look(sandbox, png()), Looked)


async def test_memory_is_bounded_and_the_child_lives_on() -> None:
    big = png(4000, 4000)
    async with running(memory_bytes=24 * MIB) as sandbox:
        with in_memory() as source, room_in_memory(3 * 16_000_000) as target:
            source.write(big)
            job = Decode(4000, 4000, 1, 1 << 30, 20.0)
            found = await sandbox.run(job, [source.fd, target.fd], Decoded, TIMEOUT_S)
        assert found == Refused(Why.MEMORY)
        assert isinstance(await look(sandbox, png()), Looked)


async def test_processor_time_is_bounded() -> None:
    async with running() as sandbox:
        await look(sandbox, png())
        [pid] = sandbox.pids
        with in_memory() as source, room_in_memory(3) as target:
            source.write(png(1, 1))
            job = Decode(1, 1, 1, 1 << 30, 3.0)
            assert await sandbox.run(job, [source.fd, target.fd], Decoded, TIMEOUT_S) == Decoded()
        assert 3 <= int(facts(pid, "limits")["Max cpu time"]) <= 8


async def test_children_are_replaced_after_many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_JOBS", 2)
    async with running() as sandbox:
        await look(sandbox, png())
        [pid] = sandbox.pids
        await look(sandbox, png())
        assert sandbox.pids == []
        assert not exists(pid)


async def test_no_turn_in_time() -> None:
    sandbox = Sandbox(Kind.IMAGES, max_children=1, memory_bytes=256 * MIB, wait_timeout_s=0.1)
    try:
        pid = await stopped(sandbox)
        first = asyncio.create_task(look(sandbox, png()))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await look(sandbox, png())
        os.kill(pid, signal.SIGCONT)
        assert isinstance(await first, Looked)
    finally:
        await sandbox.close()


async def test_closing_ends_running_jobs_and_takes_no_more() -> None:
    async with running() as sandbox:
        pid = await stopped(sandbox)
        task = asyncio.create_task(look(sandbox, png()))
        await asyncio.sleep(0)
        await sandbox.close()
        with pytest.raises(ChildFailed):
            await task
        assert not exists(pid)
        with pytest.raises(Unavailable):
            await look(sandbox, png())


async def test_an_answer_to_another_question_is_not_believed() -> None:
    async with running() as sandbox:
        with in_memory() as source:
            source.write(png())
            with pytest.raises(ChildFailed, match="another answer"):
                await sandbox.run(LOOK, [source.fd], Decoded, TIMEOUT_S)
        assert sandbox.pids == []


async def test_a_child_that_cannot_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MODULE", "trtllm_workers.media.no_such_module")
    async with running() as sandbox:
        with pytest.raises(ChildFailed):
            await look(sandbox, png())
        assert sandbox.pids == []


def test_a_room_cannot_be_cut_off_by_who_shares_it() -> None:
    with room_in_memory(1000) as room:
        for change in (lambda: os.ftruncate(room.fd, 10), lambda: os.ftruncate(room.fd, 2000)):
            _not_permitted(change)
        assert room.num_bytes == 1000


def _not_permitted(change: Callable[[], None]) -> None:
    with pytest.raises(PermissionError):
        change()


_PARENT = """
import asyncio, sys
from trtllm_workers.media.descriptors import in_memory
from trtllm_workers.media.jobs import Kind, Look, Looked
from trtllm_workers.media.sandbox import Sandbox

async def main():
    sandbox = Sandbox(Kind.IMAGES, max_children=1, memory_bytes=1 << 28, wait_timeout_s=20)
    with in_memory() as source:
        source.write(b"x")
        await sandbox.run(Look(1, 1.0), [source.fd], Looked, 20)
    print(*sandbox.pids, file=sys.stderr, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_children_die_with_their_parent() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert parent.stderr is not None
    try:
        line = b""
        async with asyncio.timeout(30):
            while not line.strip().isdigit():
                line = await parent.stderr.readline()
        with pidfd(int(line)) as process:
            parent.kill()
            await ended(process)
    finally:
        if parent.returncode is None:
            parent.kill()
        await parent.wait()

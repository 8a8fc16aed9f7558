from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from trtllm_workers.errors import TransferFailed
from trtllm_workers.transfer.tcp_thread import LoopThread, bounded


@pytest.fixture
async def thread() -> AsyncIterator[LoopThread]:
    made = LoopThread("under test")
    made.start()
    yield made
    await made.stop()


class Endless:
    """Work that never ends by itself; it notes that it began and that it ended."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.ended = threading.Event()

    async def run(self) -> None:
        self.began.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)  # an end that takes a while
            self.ended.set()


async def _begun(thread: LoopThread) -> tuple[Endless, asyncio.Task[None]]:
    endless = Endless()
    calling = asyncio.ensure_future(thread.call(endless.run()))
    await asyncio.sleep(0)
    assert endless.began.wait(10)
    return endless, calling


async def test_call_returns_what_the_work_returns_on_another_thread(thread: LoopThread) -> None:
    async def where() -> str:
        return threading.current_thread().name

    assert await thread.call(where()) == "under test"


async def test_call_raises_what_the_work_raises(thread: LoopThread) -> None:
    async def breaks() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await thread.call(breaks())


async def test_a_cancelled_call_ends_after_its_work(thread: LoopThread) -> None:
    endless, calling = await _begun(thread)
    calling.cancel()
    await asyncio.sleep(0)
    calling.cancel()  # an impatient caller waits all the same
    await asyncio.wait([calling])
    assert calling.cancelled()
    assert endless.ended.is_set()


async def test_a_call_cancelled_at_once_does_not_leave_its_work_behind(thread: LoopThread) -> None:
    endless = Endless()
    calling = asyncio.ensure_future(thread.call(endless.run()))
    await asyncio.sleep(0)
    calling.cancel()
    await asyncio.wait([calling])
    assert calling.cancelled()
    assert endless.began.is_set() == endless.ended.is_set()


async def test_stop_ends_work_and_thread(thread: LoopThread) -> None:
    endless, calling = await _begun(thread)
    before = threading.active_count()
    await asyncio.gather(thread.stop(), thread.stop())
    assert endless.ended.is_set()
    assert threading.active_count() == before - 1
    with pytest.raises(TransferFailed, match="under test was closed"):
        await calling
    with pytest.raises(TransferFailed, match="under test is closed"):
        await thread.call(Endless().run())


async def test_stop_before_start_does_nothing() -> None:
    never = LoopThread("never")
    await never.stop()
    with pytest.raises(TransferFailed, match="never is closed"):
        await never.call(Endless().run())


async def test_bounded_says_what_missed_which_deadline(thread: LoopThread) -> None:
    endless = Endless()
    with pytest.raises(TransferFailed, match=r"read from p0: not done within 0\.05 s"):
        await bounded(thread, "read from p0", 0.05, endless.run)
    assert endless.ended.is_set()


async def test_bounded_maps_a_broken_connection(thread: LoopThread) -> None:
    async def breaks() -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(TransferFailed, match="write to p0: Connection refused"):
        await bounded(thread, "write to p0", 5.0, breaks)

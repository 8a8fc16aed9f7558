from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from trtllm_workers.engines.trtllm.polling import Rearm, poll


class Result:
    """TensorRT-LLM's one result: ends after a while without data, and raises what it is told to."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.errors: list[BaseException] = []
        self.rounds = 0
        self.news = asyncio.Event()

    def __call__(self, _timeout_s: float) -> AsyncIterator[Any]:
        self.rounds += 1
        self.news.set()
        if self.errors:
            raise self.errors.pop(0)
        return self._read()

    async def _read(self) -> AsyncIterator[Any]:
        while self.items:
            yield self.items.pop(0)

    async def reaches(self, rounds: int) -> None:
        async with asyncio.timeout(5):
            while self.rounds < rounds:
                self.news.clear()
                await self.news.wait()


class Refill(list[Any]):
    """Puts a new item where the last one came from, for the next round."""

    def __init__(self, result: Result) -> None:
        self._result = result

    def append(self, item: Any) -> None:
        asyncio.get_running_loop().call_soon(self._result.items.append, item)


@asynccontextmanager
async def polling(
    result: Result, taken: list[Any], is_busy: Callable[[], bool] = lambda: False
) -> AsyncIterator[Rearm]:
    rearm = Rearm()
    task = asyncio.create_task(poll("figures", result, taken.append, rearm, is_busy))
    yield rearm
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_items_come_as_mappings_or_as_json() -> None:
    result, taken = Result(), list[Any]()
    result.items = [{"iter": 1}, '{"iter": 2}', b'{"iter": 3}']
    async with polling(result, taken):
        await result.reaches(1)
        async with asyncio.timeout(5):
            while len(taken) < 3:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0)
    assert taken == [{"iter": 1}, {"iter": 2}, {"iter": 3}]


async def test_an_idle_engine_is_asked_again_only_after_a_request() -> None:
    result = Result()
    async with polling(result, []) as rearm:
        await result.reaches(1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert result.rounds == 1
        rearm.set()
        await result.reaches(2)


async def test_a_busy_engine_is_asked_all_the_time() -> None:
    result = Result()
    result.items = [{"iter": 1}]
    async with polling(result, Refill(result), lambda: True):
        await result.reaches(5)


async def test_a_busy_engine_without_figures_is_not_asked_without_a_pause() -> None:
    result = Result()
    async with polling(result, [], lambda: True):
        await result.reaches(1)
        for _ in range(50):
            await asyncio.sleep(0)
        assert result.rounds == 1


async def test_before_the_first_request_the_refusal_is_waited_out() -> None:
    result, taken = Result(), list[Any]()
    result.errors = [AssertionError("no prompt yet")]
    async with polling(result, taken) as rearm:
        await result.reaches(1)
        result.items = [{"iter": 1}]
        rearm.set()
        await result.reaches(2)
        async with asyncio.timeout(5):
            while not taken:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0)


async def test_an_error_is_told_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trtllm_workers.engines.trtllm.polling._FIRST_PAUSE_S", 0.0)
    result = Result()
    result.errors = [RuntimeError("queue closed"), RuntimeError("queue closed")]
    async with polling(result, []):
        await result.reaches(3)
    assert capsys.readouterr().out.count("queue closed") == 1

"""Reads TensorRT-LLM's statistics and KV events as they come. Knows their rules, not their content.

The calls give one and the same result object each time. Before the first request they raise or give nothing.
Its iteration ends after ``timeout`` seconds without data, and only a new request arms it again. It
takes one reader, on the loop that submits requests.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog

log = structlog.get_logger(__name__)

# How long one round waits for data; an idle engine costs one round per request, and no more.
ROUND_S = 0.5
_FIRST_PAUSE_S = 0.5
_LAST_PAUSE_S = 30.0


class Rearm:
    """Wakes pollers: TensorRT-LLM may have something to tell again."""

    def __init__(self) -> None:
        self._news = asyncio.Event()

    def set(self) -> None:
        """A request was submitted."""
        self._news.set()

    async def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the next request, at most so long; one that came since the last wait counts."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()


async def poll(
    what: str,
    call: Callable[[float], Any],
    take: Callable[[Mapping[str, Any]], None],
    rearm: Rearm,
    is_busy: Callable[[], bool],
) -> None:
    """Give every item of ``call(timeout)`` to ``take`` until cancelled.

    While ``is_busy`` there may be more at any time; else the next request is waited for. What the API
    raises is logged once per kind and tried again, with growing pauses: figures are not worth a worker.
    """
    pause_s, told = _FIRST_PAUSE_S, ""
    while True:
        try:
            came = False
            async for item in call(ROUND_S):
                take(json.loads(item) if isinstance(item, str | bytes) else item)
                came = True
            pause_s = _FIRST_PAUSE_S
        except AssertionError:
            await rearm.wait()  # nothing was submitted yet
            continue
        except Exception as error:  # noqa: BLE001 - whatever it is, requests go on
            if (text := repr(error)) != told:
                log.warning(f"{what} of TensorRT-LLM cannot be read", error=text)
                told = text
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            continue
        if came and is_busy():
            await asyncio.sleep(0)
        else:  # a result that has ended stays ended until the next request, and must not keep the loop
            await rearm.wait(ROUND_S if is_busy() else None)

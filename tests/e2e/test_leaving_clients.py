"""Clients that leave at any moment, with real processes, the real model and the default transport."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from tests.e2e.harness import Workbench
from tests.e2e.parts import Parts, completion

LEAVING, CLIENTS = 300, 16
LENGTHS = (3, 40, 200, 600, 1200, 1800)


class Crowd:
    """Clients that stream; most leave within 0.3 s, the others check that they got the same text."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=60)
        self._dice = random.Random(20261121)
        self._texts: dict[int, str] = {}
        self.left = 0
        self.served = 0

    async def run(self) -> None:
        async with self._http:
            await asyncio.gather(*(self._client() for _ in range(CLIENTS)))

    async def _client(self) -> None:
        while self.left < LEAVING:
            kind = self._dice.randrange(2 * len(LENGTHS))
            prompt = [5 + (7 * kind + 13 * i) % 1400 for i in range(LENGTHS[kind // 2])]
            body = completion(prompt, max_tokens=30, stream=True)
            if self._dice.random() < 0.7:
                try:
                    async with asyncio.timeout(self._dice.random() * 0.3):
                        await self._read(body)
                except TimeoutError:
                    self.left += 1
            else:
                text = await self._read(body)
                assert self._texts.setdefault(kind, text) == text, "the same prompt, another text"
                self.served += 1

    async def _read(self, body: dict[str, Any]) -> str:
        text = ""
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    text += event["choices"][0]["text"]
        return text


@pytest.mark.parametrize("strategy", ["decode_first", "prefill_first"])
async def test_clients_that_leave_cost_no_block_and_no_text(
    bench: Workbench, strategy: str
) -> None:
    _, url = await asyncio.to_thread(
        bench.up,
        *("--disaggregated", "--strategy", strategy, "--num-prefill-workers", "2"),
        *("--canary-interval-s", "1", "--log-level", "warning"),
    )
    crowd = Crowd(url)
    await crowd.run()
    assert crowd.served > 30
    parts = Parts(bench)
    parts.url = url
    await asyncio.to_thread(parts.wait_no_block_held)
    assert parts.metric("aborted_requests_total", cause="client_left") > LEAVING / 3
    assert parts.metric("canary_total", result="mismatch") == 0
    assert parts.metric("prefill_fallbacks_total") == 0

"""A deployment on hosts of our own that is asked for greedy answers while things happen to it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

from tests.e2e.guide import ROOT, Guide, Step
from tests.e2e.harness import Process

BODY = {
    "model": "demo",
    "prompt": "A prompt that fills more than one block of KV, so that something is to be moved. "
    * 3,
    "max_tokens": 16,
    "temperature": 0,
}
ASK = "curl -s -m 60 http://host1:8000/v1/completions -H 'content-type: application/json' -d "


class Rehearsal(Guide):
    """A deployment on several hosts, and what it says."""

    def launch(self, host: int, words: str) -> Process:
        return self.start(Step(host, f"{ROOT}/launch/{words}"))

    def answer(self, number: int = 0) -> str:
        """Return the text of a greedy answer; prompts of different numbers share no block."""
        body = json.dumps(BODY | {"prompt": f"{number} {BODY['prompt']}"})
        told = json.loads(self.run(Step(1, f"{ASK}'{body}'")))
        assert "choices" in told, told
        return str(told["choices"][0]["text"])

    def ready(self) -> None:
        self.until(Step(1, "curl -s http://host1:8000/ready"), '{"status":"ready"}')

    def metric(self, name: str) -> float:
        told = self.run(Step(1, "curl -s http://host1:8000/metrics"))
        return sum(
            map(float, re.findall(rf"^trtllm_launch_{name}{{.*}} (\S+)$", told, re.MULTILINE))
        )

    def balanced(self) -> bool:
        return self.metric("blocks_allocated_total") == self.metric("blocks_freed_total")


def within(seconds: float, met: Callable[[], bool]) -> None:
    """Fail unless it is met in time."""
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline

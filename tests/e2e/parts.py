"""Ingress and workers as separate commands that share a discovery folder: each may die alone."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import START_TIMEOUT_S, Process, Workbench


class Parts:
    """One deployment made by hand. ``common`` options go to every worker."""

    def __init__(self, bench: Workbench, *common: str, name: str = "one") -> None:
        self.bench = bench
        self.common = common
        self.discovery = (bench.path / f"discovery-{name}").as_uri()
        self.workers: dict[str, Process] = {}
        self.url = ""

    def ingress(self, *options: str) -> str:
        """Start an ingress and return its base URL."""
        process = self.bench.start(
            "ingress", "--http-port", "0", "--discovery", self.discovery, *options
        )
        self.url = process.wait_line(r"listening .*url=(http://\S+)").group(1)
        return self.url

    def worker(self, role: str, name: str, *options: str, **environ: str) -> Process:
        """Start a worker; it need not have registered yet."""
        process = self.bench.start(
            "worker",
            *("--role", role, "--worker-id", name, "--discovery", self.discovery),
            *(*self.common, *options),
            **environ,
        )
        self.workers[name] = process
        return process

    def pid(self, name: str) -> int:
        return self.workers[name].popen.pid

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20)

    def wait_ready(self) -> None:
        """Wait until a whole chain is up."""
        self.wait(lambda: self.get("/ready").json() == {"status": "ready"}, "ready")

    def wait_pairs(self, count: int, state: str = "ready") -> None:
        """Wait until so many pairs are in a state."""
        line = re.compile(rf'^trtllm_launch_kv_pairs{{.*state="{state}".*}} 1\.0$', re.MULTILINE)
        self.wait(lambda: len(line.findall(self.get("/metrics").text)) == count, f"{count} pairs")

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum over the series that have these labels."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"trtllm_launch_{name}"):
                series, value = line.rsplit(" ", 1)
                if all(f'{label}="{one}"' in series for label, one in labels.items()):
                    total += float(value)
        return total

    def wait(self, met: Callable[[], Any], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Look again and again: what other processes do has no event here."""
        deadline = time.monotonic() + timeout_s
        while not met():
            assert time.monotonic() < deadline, (
                f"not {what} within {timeout_s} s: {self.get('/health').text}\n"
                + "\n".join(f"--- {n}\n{drained(p)}" for n, p in self.workers.items())
            )
            threading.Event().wait(0.05)

    def wait_no_block_held(self) -> None:
        """Wait until every worker says that all its blocks are back."""

        def all_back() -> bool:
            allocated = self.metric("blocks_allocated_total")
            return allocated > 0 and allocated == self.metric("blocks_freed_total")

        self.wait(all_back, "all blocks back", 20)
        assert self.metric("leaked_blocks_total") == 0


def drained(process: Process) -> str:
    """Return what a process has said so far."""
    while not process._news.empty():
        process._take(0.1)
    return process.output


def completion(prompt: str | list[int], max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def text_of(url: str, body: dict[str, Any]) -> str:
    """Return the text of a completion that must succeed."""
    response = httpx.post(url + "/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    text = response.json()["choices"][0]["text"]
    assert isinstance(text, str)
    return text


def costs(path: Path, *, prefill_ms_per_token: float = 0.0, decode_ms: float = 0.0) -> str:
    """Write a cost model and return its path."""
    path.write_text(
        f"prefill:\n  per_token_us: {prefill_ms_per_token * 1000}\n"
        f"decode:\n  base_ms: {decode_ms}\n"
    )
    return str(path)

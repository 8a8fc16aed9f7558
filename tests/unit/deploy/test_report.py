"""The sentences a run begins and ends with, word for word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trtllm_workers.deploy import report

LINES = ["loading shard 2 of 5", "RuntimeError: shape mismatch in layers.3.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit code 0: without an error, but nobody asked it to end"),
        (1, "ended with exit code 1"),
        (4, "ended with exit code 4: the engine died"),
        (-11, "was killed by SIGSEGV (signal 11): segmentation fault in native code"),
        (-12, "was killed by SIGUSR2 (signal 12)"),
        (-40, "was killed by a real-time signal (signal 40)"),
    ],
)
def test_exit_in_words_says_code_or_signal(status: int, words: str) -> None:
    assert report.exit_in_words(status) == words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_duration_reads_as_people_say_it(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text
    assert report.duration(3 * 86400 + 4 * 3600) == "3 d 4 h"


def test_reports_match_their_golden_files(golden: Callable[[str, str], None]) -> None:
    log = Path("/runs/abc123/logs/worker-0.log")
    texts = [
        report.death("worker-0", -9, after_s=75.0, step="ready", lines=LINES, log=log),
        report.death("ingress", 3, after_s=0.4, step="starting", lines=[], log=log),
        report.stuck(
            "worker-0", "model 60 %", since_s=42.0, timeout_s=300.0, lines=LINES[:1], log=log
        ),
        report.banner(
            run_id="abc123",
            model="it's a model",
            url="http://127.0.0.1:8000",
            took_s=3.21,
            log_dir=log.parent,
        ),
    ]
    golden("reports.txt", "\n\n".join(texts))

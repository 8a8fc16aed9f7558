"""The README's own examples, run against the served demo model; only the port is another."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.test_documents import ROOT, blocks


def test_the_curl_example_streams_a_sensible_answer(served: str) -> None:
    (command,) = blocks(ROOT / "README.md", "sh")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command.replace("http://127.0.0.1:8000", served)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert "prompt" in text.lower()


def test_the_python_example_prints_a_sensible_answer(served: str) -> None:
    (program,) = blocks(ROOT / "README.md", "py")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("http://127.0.0.1:8000", served)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5

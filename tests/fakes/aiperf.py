"""A stand-in for the program aiperf: takes its arguments and writes files such as aiperf 0.13.0 writes.

Asks no server. Prompts whose mean length ends with 7 make every fourth request fail.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

START_NS = 1_795_265_055_000_000_000


def main(words: list[str]) -> int:
    """Write a run's files; return aiperf's exit code."""
    if words[:1] != ["profile"]:
        return 2
    given = {word: value for word, value in itertools.pairwise(words) if word.startswith("--")}
    folder = Path(given["--artifact-dir"])
    folder.mkdir(parents=True)
    tokens, osl = int(given["--synthetic-input-tokens-mean"]), int(given["--output-tokens-mean"])
    (folder / "argv.json").write_text(json.dumps(words))
    count, warmup = int(given["--request-count"]), int(given.get("--warmup-request-count", 0))
    lines = []
    for number in range(warmup + count):
        phase = "warmup" if number < warmup else "profiling"
        failed = tokens % 10 == 7 and number % 4 == 0
        lines.append(record(number, phase, tokens, osl, failed=failed))
    (folder / "profile_export.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    summary = {"schema_version": "1.4", "aiperf_version": "0.13.0", "is_complete": True}
    (folder / "profile_export_aiperf.json").write_text(json.dumps(summary))
    return 0


def record(number: int, phase: str, tokens: int, osl: int, *, failed: bool) -> dict[str, object]:
    """Return a line of profile_export.jsonl; times are in nanoseconds and milliseconds."""
    start_ns = START_NS + number * 100_000_000
    took_ns = (20 + 10 * (osl - 1)) * 1_000_000
    metadata = {
        "session_num": number,
        "request_start_ns": start_ns,
        "request_end_ns": start_ns if failed else start_ns + took_ns,
        "benchmark_phase": phase,
        "was_cancelled": False,
    }
    if failed:
        message = '{"error":{"message":"queue is full"}}'
        error = {"code": 429, "type": "Too Many Requests", "message": message}
        return {"metadata": metadata, "metrics": {}, "error": error}
    metrics = {
        "usage_prompt_tokens": {"value": tokens + 5, "unit": "tokens"},
        "usage_completion_tokens": {"value": osl, "unit": "tokens"},
        "usage_prompt_cache_read_tokens": {"value": 0, "unit": "tokens"},
        "time_to_first_token": {"value": 20.0, "unit": "ms"},
        "inter_chunk_latency": {"value": [10.0] * (osl - 1), "unit": "ms"},
    }
    return {"metadata": metadata, "metrics": metrics}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

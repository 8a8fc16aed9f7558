"""Levels, sweeps and streams of events made up for the bench's tests. Holds no test."""

from __future__ import annotations

import json
from collections.abc import Sequence

from trtllm_workers.bench.deployment import Real, Stated
from trtllm_workers.bench.records import Record
from trtllm_workers.bench.results import Level, Results, level_of, new_results
from trtllm_workers.bench.workload import Load, Workload

WORKLOAD = Workload(isl=100, osl=11)


def load(streams: int, num_requests: int = 100) -> Load:
    return Load(concurrency=streams, num_requests=num_requests, num_warmup=0)


def record(
    index: int = 0, *, start_s: float = 0.0, ttft_s: float = 0.1, itl_s: float = 0.01, osl: int = 11
) -> Record:
    chunks = [start_s + ttft_s + itl_s * number for number in range(osl)]
    return Record(
        index=index,
        intended_s=start_s,
        start_s=start_s,
        end_s=chunks[-1],
        chunks_s=chunks,
        prompt_tokens=100,
        output_tokens=osl,
        finish_reason="length",
    )


def level(
    streams: int = 4,
    *,
    ttft_s: float = 0.1,
    itl_s: float = 0.01,
    spread: float = 0.05,
    num_requests: int = 100,
    num_failed: int = 0,
    phases_s: dict[str, float] | None = None,
) -> Level:
    """Return a level whose requests differ by ``spread`` about the figures given."""
    records: list[Record] = []
    free = [0.0] * streams
    for index in range(num_requests):
        factor = 1 + spread * ((index * 7 % 11) / 10 - 0.5)
        start_s = min(free)
        one = record(index, start_s=start_s, ttft_s=ttft_s * factor, itl_s=itl_s * factor)
        free[free.index(start_s)] = one.end_s
        if index < num_failed:
            one.problem = "no text in the answer"
        records.append(one)
    return level_of(load(streams, num_requests), records, cpu_s=0.1, phases_s=phases_s)


def results(levels: Sequence[Level], *, workers: int = 1) -> Results:
    made = new_results(
        client="own",
        url="http://localhost:8000",
        kind="trtllm-launch",
        workload=WORKLOAD,
        stated=Stated(),
        real=Real(
            model="demo",
            mode="aggregated",
            engine="sim",
            device="cpu",
            num_workers={"aggregated": workers},
        ),
    )
    made.levels = list(levels)
    return made


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_event(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])

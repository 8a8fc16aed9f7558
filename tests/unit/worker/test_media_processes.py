"""Images of another process: read by every transport, and lost when it is killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.unit.worker.media_cluster import TRANSPORTS, Gate, at_rest, media_stats, seen, stage
from tests.unit.worker.media_stage import ROW_BYTES, make_store, pattern, request_with, until
from trtllm_workers.types import MediaItem, Role

ROOT = Path(__file__).resolve().parents[3]
DEADLINE_S = 30.0
TOKENS = 300


@contextmanager
def holder(transport: str) -> Iterator[tuple[subprocess.Popen[str], MediaItem]]:
    """Start a process that holds an item."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.media_holder", transport, str(TOKENS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = next(line for line in process.stdout if line.startswith("item "))
        yield process, msgspec.msgpack.decode(bytes.fromhex(told[5:]), type=MediaItem)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_items_of_another_process_are_read(tmp_path: Path, transport: str) -> None:
    async with stage(tmp_path) as on:
        with holder(transport) as (_, item):
            agg = await on.add(
                Role.AGGREGATED, "a0", media_transport=transport, store=make_store(64, 16)
            )
            await on.made.answer(on.made.submit(request_with([item], text=5), "a0"))
            assert seen(agg) == [[pattern(b"far", TOKENS * ROW_BYTES)]]
            (flow,) = media_stats(agg).flows
            assert flow.wire
        await on.settled()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_holder_that_is_killed_while_it_is_read_ends_the_request(
    tmp_path: Path, transport: str
) -> None:
    async with stage(tmp_path) as on:
        with holder(transport) as (process, item):
            gate = Gate()
            agg = await on.add(
                Role.AGGREGATED,
                "a0",
                media_transport=transport,
                store=make_store(64, 16),
                wrap_media=gate.transport,
            )
            stream = on.made.submit(request_with([item], text=5), "a0")
            async with asyncio.timeout(DEADLINE_S):
                await gate.reading.wait()
            process.kill()
            code, message = await on.failure(stream)
            assert code == "media_gone"
            assert "e0" in message
            gate.open.set()
            await at_rest(agg)
            assert seen(agg) == []
            # And it is found gone by the next one too, which has to connect.
            code, _ = await on.failure(on.made.submit(request_with([item], text=5), "a0"))
            assert code == "media_gone"
        await on.settled()
        await until(lambda: gate.num_closed == gate.num_links)

"""How long a prompt may be, and how engine-native KV is shown."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL, record
from tests.unit.ingress.fakes import FakeWorker, began, says
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import stage
from trtllm_workers.types import Role

ANSWER = "Hello world. And more."


def limited(checkpoint: Path, name: str, max_prompt_len: int, script: Any = None) -> FakeWorker:
    return FakeWorker(record(checkpoint, name, max_prompt_len=max_prompt_len), script)


async def test_a_prompt_beyond_the_smallest_buffer_is_refused(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    answer = says(tokenizer, ANSWER)
    workers = [
        limited(checkpoint, name, limit, answer)
        for name, limit in (("w0", 20), ("w1", 10), ("w2", 0))
    ]
    async with stage(*workers) as playing:
        await playing.until(lambda: len(playing.fleet.models[MODEL].workers) == 3)
        fits = await playing.complete([5] * 10)
        longer = await playing.complete([5] * 11)
        chat = await playing.chat("Hello " * 30)
        [listed] = (await playing.client.get("/v1/models")).json()["data"]
        shown = (await playing.client.get("/health")).json()["models"][MODEL]["workers"]
    assert fits.status_code == 200
    error = longer.json()["error"]
    assert (longer.status_code, error["code"], error["param"]) == (
        400,
        "context_length_exceeded",
        "prompt",
    )
    assert error["message"] == (
        f"the prompt has 11 tokens, and the workers of '{MODEL}' take at most 10: a longer prompt "
        "does not fit the buffer that moves its KV from a prefill to a decode worker; shorten the "
        "prompt (the operator can raise cache_transceiver_config.max_tokens_in_buffer in the "
        "engine configs of both roles)"
    )
    assert chat.json()["error"]["param"] == "messages"
    assert sum(len(worker.submits) for worker in workers) == 1
    assert listed["max_prompt_len"] == 10
    assert [one.get("max_prompt_len") for one in shown] == [20, 10, None]


async def test_without_a_buffer_only_the_context_bounds_a_prompt(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fake = FakeWorker(record(checkpoint), says(tokenizer, ANSWER))
    async with stage(fake) as playing:
        assert (await playing.complete([5] * 400)).status_code == 200
        [listed] = (await playing.client.get("/v1/models")).json()["data"]
    assert "max_prompt_len" not in listed


@pytest.mark.parametrize(("told", "moves"), [(2, True), (3, False)])
async def test_a_stream_moves_only_while_what_there_is_fits_as_a_prompt(
    checkpoint: Path, tokenizer: Tokenizer, told: int, moves: bool
) -> None:
    token_ids = tokenizer.encode(ANSWER).ids
    workers = [limited(checkpoint, name, 12) for name in ("w0", "w1")]
    async with stage(*workers) as playing:
        asked = asyncio.create_task(playing.complete([5] * 10, stream=True, max_tokens=40))
        used, other, submit = await began(*workers)
        used.chunk(submit.stream, token_ids[:told])
        used.lose("killed")
        if moves:
            await other.until_submits(1)
            other.answer(other.submits[0], token_ids[told:])
        response = await asked
    assert ("worker_lost" in response.text) is not moves
    assert len(other.submits) == moves


@pytest.mark.parametrize(
    ("engine", "shown"),
    [
        ({}, "none"),
        ({"kv_transport": "ucx,tcp"}, "ucx,tcp"),
        ({"kv_transport": "engine-native"}, "engine-native"),
        ({"kv_transport": "engine-native", "kv_wire": "UCX"}, "engine-native (UCX)"),
    ],
)
async def test_health_shows_how_kv_was_seen_to_move(
    checkpoint: Path, engine: dict[str, Any], shown: str
) -> None:
    async with stage(FakeWorker(record(checkpoint, **engine))) as playing:
        health = (await playing.client.get("/health")).json()
    assert health["models"][MODEL]["workers"][0]["kv_transport"] == shown


@pytest.mark.parametrize("wire", ["UCX", ""])
async def test_pairs_of_engine_native_kv_show_no_rate(checkpoint: Path, wire: str) -> None:
    prefill = Worker(checkpoint, "p0", Role.PREFILL)
    decode = Worker(checkpoint, "d0", Role.DECODE, prefill, moves=("engine-native", wire, 0, 0.0))
    async with stage(prefill, decode) as playing:
        text = (await playing.client.get("/metrics")).text
        workers = (await playing.client.get("/health")).json()["models"][MODEL]["workers"]
    [pair] = next(one["pairs"] for one in workers if one["worker_id"] == "d0")
    assert pair == {
        "prefill": "p0",
        "state": "ready",
        "reason": "the reason",
        "transport": "engine-native",
        "wire": wire,
        "handoffs": 3,
    }
    labels = f'peer="p0",transport="engine-native",wire="{wire}",worker_id="d0"'
    assert f"trtllm_launch_kv_transfers_total{{{labels}}} 3.0" in text
    assert f"trtllm_launch_kv_transfer_seconds_total{{{labels}}} 0.001" in text
    assert f"trtllm_launch_kv_transfer_bytes_total{{{labels}}}" not in text
    assert f"trtllm_launch_kv_transfer_gigabytes_per_second{{{labels}}}" not in text

"""Prefill and decode workers as an ingress sees them: strategies, readiness, losses, aborts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import Stage, stage, text_of
from trtllm_workers.types import FinishReason, Role, Strategy

ANSWER = "Hello world. And more."
PREFILL_FIRST: Any = {"strategy": Strategy.PREFILL_FIRST}


def trio(checkpoint: Path, **fields: Any) -> tuple[Worker, Worker, Worker]:
    """Return two prefill workers and a decode worker that is paired with both."""
    prefills = (Worker(checkpoint, "p0", Role.PREFILL), Worker(checkpoint, "p1", Role.PREFILL))
    return (*prefills, Worker(checkpoint, "d0", Role.DECODE, *prefills, **fields))


async def first_of(*workers: Worker) -> Worker:
    async with asyncio.timeout(5):
        while True:
            for worker in workers:
                if worker.submits:
                    return worker
            await asyncio.sleep(0)


async def test_decode_first_sends_to_decode_alone(checkpoint: Path, tokenizer: Tokenizer) -> None:
    p0, p1, d0 = trio(checkpoint)
    d0.script = lambda worker, submit: worker.answer(submit, tokenizer.encode(ANSWER).ids)
    async with stage(p0, p1, d0) as playing:
        assert (await playing.chat()).status_code == 200
    assert not p0.submits
    assert not p1.submits
    assert d0.submits[0].decode is None


async def test_prefill_first_names_the_decode_worker_and_takes_turns(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    p0, p1, d0 = trio(checkpoint)
    ids = tokenizer.encode(ANSWER).ids
    async with stage(p0, p1, d0, **PREFILL_FIRST) as playing:
        for prefill in (p0, p1):  # tokens come from decode, whoever got the request
            prefill.script = lambda _worker, submit: d0.answer(submit, ids)
        for _ in range(4):
            assert text_of(await playing.chat(stream=True)) == ANSWER
    assert len(p0.submits) == len(p1.submits) == 2
    assert p0.submits[0].decode == d0.record.address
    assert not d0.submits


async def test_a_short_prompt_goes_to_decode_at_once(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    p0, p1, d0 = trio(checkpoint, max_local_prefill_length=1000)
    d0.script = lambda worker, submit: worker.answer(submit, tokenizer.encode(ANSWER).ids)
    async with stage(p0, p1, d0, **PREFILL_FIRST) as playing:
        assert (await playing.chat()).status_code == 200
    assert not p0.submits
    assert len(d0.submits) == 1


async def ready_says(playing: Stage) -> tuple[int, Any]:
    response = await playing.client.get("/ready")
    return response.status_code, response.json()


async def test_ready_waits_for_a_whole_chain_and_says_what_is_missing(checkpoint: Path) -> None:
    p0, p1, d0 = trio(checkpoint)
    prefills, d0.prefills = d0.prefills, []
    async with stage(d0, ready=False) as playing:
        await playing.until(lambda: any(s.text for s in playing.fleet.models.values()))
        d0.tell()
        status, said = await ready_says(playing)
        assert status == 503
        assert "decode worker d0 has no prefill worker: none has registered" in str(said)
        refused = await playing.chat()
        assert refused.status_code == 503
        for worker in (p0, p1):
            playing.plane.add(worker)
        playing.discovery.show(*(worker.record for worker in (p0, p1, d0)))
        d0.prefills = prefills
        d0.tell("mismatch")
        status, said = await ready_says(playing)
        assert status == 503
        assert "p0 mismatch: the reason" in str(said)
        d0.tell()
        assert await ready_says(playing) == (200, {"status": "ready"})
        assert (await playing.client.get("/v1/models")).json()["data"]
        d0.tell("lost")
        status, said = await ready_says(playing)
        assert status == 200, "decode computes prompts itself"
        assert "p0 lost: the reason" in said["degraded"][MODEL]


async def test_a_prefill_worker_alone_serves_nothing(checkpoint: Path) -> None:
    p0 = Worker(checkpoint, "p0", Role.PREFILL)
    async with stage(p0, ready=False) as playing:
        await playing.until(lambda: any(s.text for s in playing.fleet.models.values()))
        status, said = await ready_says(playing)
        assert status == 503
        assert "no decode worker has registered" in str(said)


async def test_a_client_that_leaves_is_told_to_both(checkpoint: Path) -> None:
    p0, p1, d0 = trio(checkpoint)
    async with stage(p0, p1, d0, **PREFILL_FIRST) as playing:
        call = playing.call(max_tokens=50)
        used = await first_of(p0, p1)
        stream = used.submits[0].stream
        call.left.set()
        await used.until(lambda: stream in used.aborted)
        await d0.until(lambda: stream in d0.aborted)


async def test_a_prefill_worker_lost_before_the_first_token_moves_the_stream(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    p0, p1, d0 = trio(checkpoint)
    async with stage(p0, p1, d0, **PREFILL_FIRST) as playing:
        asked = asyncio.create_task(playing.chat(stream=True))
        used = await first_of(p0, p1)
        other = p1 if used is p0 else p0
        stream = used.submits[0].stream
        used.lose()
        await other.until_submits(1)
        assert stream in d0.aborted, "it may have been handed over already"
        d0.answer(other.submits[0], tokenizer.encode(ANSWER).ids)
        assert text_of(await asked) == ANSWER


async def test_a_prefill_worker_lost_after_the_first_token_is_not_missed(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    p0, p1, d0 = trio(checkpoint)
    ids = tokenizer.encode(ANSWER).ids
    async with stage(p0, p1, d0, **PREFILL_FIRST) as playing:
        asked = asyncio.create_task(playing.chat(stream=True))
        used = await first_of(p0, p1)
        submit = used.submits[0]
        d0.chunk(submit.stream, ids[:1])
        used.lose()
        for token_id in ids[1:]:
            d0.token(submit.stream, token_id)
        d0.end(submit.stream, num_hidden_tokens=1)
        assert text_of(await asked) == ANSWER
        assert len(p0.submits) + len(p1.submits) == 1
        assert not d0.aborted


async def test_a_decode_worker_that_is_lost_is_replaced(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    p0 = Worker(checkpoint, "p0", Role.PREFILL)
    decodes = [Worker(checkpoint, name, Role.DECODE, p0) for name in ("d0", "d1")]
    ids = tokenizer.encode(ANSWER).ids
    async with stage(p0, *decodes, **PREFILL_FIRST) as playing:
        await playing.until(
            lambda: all(w.ready_pairs for s in playing.fleet.models.values() for w in s.makers)
        )
        asked = asyncio.create_task(playing.chat(stream=True, max_tokens=40))
        await p0.until_submits(1)
        submit = p0.submits[0]
        used = next(one for one in decodes if one.record.address == submit.decode)
        other = next(one for one in decodes if one is not used)
        used.chunk(submit.stream, ids[:1])
        used.token(submit.stream, ids[1])
        used.lose()
        await p0.until_submits(2)
        again = p0.submits[1]
        assert again.decode == other.record.address
        assert again.request.prompt_token_ids == submit.request.prompt_token_ids + ids[:2]
        other.answer(again, ids[2:])
        assert text_of(await asked) == ANSWER


async def test_an_expired_handoff_is_tried_again(checkpoint: Path, tokenizer: Tokenizer) -> None:
    p0, p1, d0 = trio(checkpoint)
    async with stage(p0, p1, d0, **PREFILL_FIRST) as playing:
        asked = asyncio.create_task(playing.chat(stream=True))
        used = await first_of(p0, p1)
        before = len(p0.submits) + len(p1.submits)
        used.end(
            used.submits[0].stream,
            FinishReason.ERROR,
            error_code="handoff_expired",
            error_message="5 blocks waited",
        )
        other = p1 if used is p0 else p0
        await other.until(lambda: len(p0.submits) + len(p1.submits) > before)
        last = max((*p0.submits, *p1.submits), key=lambda submit: submit.stream)
        d0.answer(last, tokenizer.encode(ANSWER).ids)
        assert text_of(await asked) == ANSWER


async def test_a_stream_that_nobody_knows_is_aborted_where_it_comes_from(checkpoint: Path) -> None:
    p0, p1, d0 = trio(checkpoint)
    async with stage(p0, p1, d0):
        d0.chunk(4711, (5,))
        await d0.until(lambda: d0.aborted == [4711])
        d0.end(4712)
        assert d0.aborted == [4711], "one that has ended needs no abort"


async def test_metrics_show_pairs_fallbacks_and_phases(checkpoint: Path) -> None:
    p0, p1, d0 = trio(checkpoint)
    async with stage(p0, p1, d0) as playing:
        d0.tell(
            ended=[("released", "fetched", 7)],
            fallbacks=[("prefill_lost", 2)],
            local=4,
            phases=[(0.1, 0.2, 0.003, 0.004)],
            leaked_blocks=1,
        )
        text = (await playing.client.get("/metrics")).text
        health = (await playing.client.get("/health")).json()
    pair = 'peer="p0",transport="ucx",wire="shm",worker_id="d0"'
    for line in (
        f"trtllm_launch_kv_transfers_total{{{pair}}} 3.0",
        f"trtllm_launch_kv_transfer_bytes_total{{{pair}}} 6e+06",
        f"trtllm_launch_kv_transfer_gigabytes_per_second{{{pair}}} 6.0",
        'trtllm_launch_handoffs_total{cause="fetched",state="released",worker_id="d0"} 7.0',
        'trtllm_launch_prefill_fallbacks_total{cause="prefill_lost",worker_id="d0"} 2.0',
        'trtllm_launch_local_prefills_total{worker_id="d0"} 4.0',
        'trtllm_launch_leaked_blocks_total{worker_id="d0"} 1.0',
        'trtllm_launch_kv_pairs{peer="p1",state="ready",worker_id="d0"} 1.0',
        'trtllm_launch_canary_total{peer="p0",result="passed",worker_id="d0"} 0.0',
        'trtllm_launch_first_token_phase_seconds_sum{model="test/tiny",phase="prefill"} 0.2',
    ):
        assert line in text, line
    shown = next(w for w in health["models"][MODEL]["workers"] if w["worker_id"] == "d0")
    assert shown["role"] == "decode"
    assert shown["pairs"][0]["transport"] == "ucx"

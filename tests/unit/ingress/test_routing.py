"""Mode kv as clients and workers see it: events, gaps, readiness, strategies, explanations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from tests.unit.ingress.checkpoints import MODEL
from tests.unit.ingress.roles import Worker
from tests.unit.ingress.stage import stage
from trtllm_workers.blocks import block_hashes, root_hash
from trtllm_workers.ingress.settings import RouterSettings
from trtllm_workers.planes.messages import EventsAsk, KvEvents, Message
from trtllm_workers.router.policies import RouterMode
from trtllm_workers.types import FinishReason, KvEvent, KvEventKind, Role, Strategy

KV = RouterSettings(RouterMode.KV)
LONG = "The quick brown fox jumps over the lazy dog. " * 12


class Publisher(Worker):
    """A fake that tells KV events: a snapshot when asked, then what the test says."""

    def __init__(self, *args: Any, quiet: bool = False, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.quiet = quiet
        self.turns: list[int] = []
        self.seq = 5

    def on_message(self, message: Message) -> None:
        super().on_message(message)
        if isinstance(message, EventsAsk):
            self.turns.append(message.turn)
            if not self.quiet:
                self.publish(KvEvent(seq=self.seq, kind=KvEventKind.CLEARED))

    def publish(self, *events: KvEvent, turn: int | None = None) -> None:
        self.say(KvEvents(self.turns[-1] if turn is None else turn, list(events)))

    def store(self, token_ids: list[int], *, skip: int = 0, salt: str = "") -> None:
        self.seq += 1 + skip
        hashes = block_hashes(token_ids, 16, root_hash("tiny", salt))
        self.publish(KvEvent(seq=self.seq, kind=KvEventKind.STORED, block_hashes=tuple(hashes)))


def pair(checkpoint: Path, tokenizer: Tokenizer, **fields: Any) -> list[Publisher]:
    both = [Publisher(checkpoint, f"w{at}", Role.AGGREGATED, **fields) for at in range(2)]
    ids = tokenizer.encode("Hello").ids
    for one in both:
        one.script = lambda worker, submit: worker.answer(submit, ids)
    return both


async def test_requests_go_where_their_prefix_is(checkpoint: Path, tokenizer: Tokenizer) -> None:
    w0, w1 = pair(checkpoint, tokenizer)
    async with stage(w0, w1, router=KV) as playing:
        for holder, other in ((w0, w1), (w1, w0)):
            text = f"{holder.record.worker_id} {LONG}"
            ids = tokenizer.encode(text).ids
            holder.store(ids)
            for _ in range(4):
                assert (await playing.complete(text, max_tokens=4)).status_code == 200
            assert [one.request.prompt_token_ids for one in holder.submits[-4:]] == [ids] * 4
            assert not any(one.request.prompt_token_ids == ids for one in other.submits)


async def test_a_salt_is_another_prefix(checkpoint: Path, tokenizer: Tokenizer) -> None:
    w0, w1 = pair(checkpoint, tokenizer)
    async with stage(w0, w1, router=KV) as playing:
        w1.store(tokenizer.encode(LONG).ids, salt="tenant")
        told = await playing.client.post("/router/explain", json={"model": MODEL, "prompt": LONG})
        assert told.json()["maker"]["overlap_tokens"] == 0
        body = {"model": MODEL, "prompt": LONG, "cache_salt": "tenant"}
        told = await playing.client.post("/router/explain", json=body)
        assert told.json()["maker"]["overlap_tokens"] > 64
        assert told.json()["maker"]["worker_id"] == "w1"
        assert not w0.submits
        assert not w1.submits, "only explained"


async def test_a_prompt_that_was_just_sent_counts_before_its_events_come(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    w0, w1 = pair(checkpoint, tokenizer)
    async with stage(w0, w1, router=KV) as playing:
        for _ in range(6):
            assert (await playing.complete(LONG, max_tokens=4)).status_code == 200
    assert sorted([len(w0.submits), len(w1.submits)]) == [0, 6]


async def test_an_answer_that_never_began_is_not_taken_for_cached(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    w0, w1 = pair(checkpoint, tokenizer)
    async with stage(w0, w1, router=KV) as playing:
        assert (await playing.complete(LONG, max_tokens=4)).status_code == 200
        fresh = f"other {LONG}"
        for one in (w0, w1):
            one.script = lambda worker, submit: worker.end(
                submit.stream, FinishReason.ERROR, error_code="engine_error", error_message="no"
            )
        assert (await playing.complete(fresh, max_tokens=4)).status_code == 500
        told = await playing.client.post("/router/explain", json={"model": MODEL, "prompt": fresh})
        assert told.json()["maker"]["overlap_tokens"] == 0


async def test_after_a_gap_a_snapshot_is_asked_for_and_nothing_wrong_is_believed(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    w0, w1 = pair(checkpoint, tokenizer)
    ids = tokenizer.encode(LONG).ids
    explained = {"model": MODEL, "prompt": LONG}
    async with stage(w0, w1, router=KV) as playing:
        w1.store(ids)
        w1.quiet = True
        w1.store(tokenizer.encode("Hello" * 50).ids, skip=1)  # one event was lost
        assert w1.turns == [1, 2]
        told = (await playing.client.post("/router/explain", json=explained)).json()
        assert told["maker"]["overlap_tokens"] == 0
        hashes = tuple(block_hashes(ids, 16, root_hash("tiny")))
        w1.publish(KvEvent(seq=99, kind=KvEventKind.STORED, block_hashes=hashes), turn=1)
        assert w1.turns == [1, 2], "what still comes of the old subscription is not looked at"
        w1.publish(
            KvEvent(seq=40, kind=KvEventKind.CLEARED),
            KvEvent(seq=40, kind=KvEventKind.STORED, block_hashes=hashes),
        )
        told = (await playing.client.post("/router/explain", json=explained)).json()
        assert told["maker"]["overlap_tokens"] > 64
        shown = (await playing.client.get("/router")).json()
        assert [one["resyncs"] for one in shown["workers"]] == [0, 1]
        assert shown["mode"] == "kv"
        metrics = (await playing.client.get("/metrics")).text
        assert 'trtllm_launch_router_resyncs_total{worker_id="w1"} 1.0' in metrics


async def test_it_is_not_ready_until_events_have_come(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    w0, w1 = pair(checkpoint, tokenizer, quiet=True)
    async with stage(w0, w1, router=KV, ready=False) as playing:
        await playing.until(lambda: playing.fleet.models and playing.fleet.models[MODEL].text)
        await playing.until(lambda: w0.turns and w1.turns)
        response = await playing.client.get("/ready")
        assert response.status_code == 503
        assert "its KV events have not come yet" in response.json()["missing"][MODEL]
        assert (await playing.chat()).status_code == 503
        w1.publish(KvEvent(seq=0, kind=KvEventKind.CLEARED))
        await playing.until_ready()
        assert (await playing.client.get("/ready")).status_code == 200
        assert (await playing.chat(max_tokens=4)).status_code == 200
        assert len(w1.submits) == 1


async def test_a_worker_without_events_is_named_with_the_remedy(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    w0, w1 = pair(checkpoint, tokenizer, no_kv_events="engine trtllm publishes none")
    async with stage(w0, w1, router=KV, ready=False) as playing:
        await playing.until(lambda: playing.fleet.models and playing.fleet.models[MODEL].text)
        await playing.until(lambda: all(one.peer for one in (w0, w1)))
        missing = (await playing.client.get("/ready")).json()["missing"][MODEL]
        assert "engine trtllm publishes none" in missing
        assert "--router-events off" in missing
        assert not w0.turns, "there is nothing to ask for"
    guessing = RouterSettings(RouterMode.KV, uses_events=False)
    w0, w1 = pair(checkpoint, tokenizer, no_kv_events="engine trtllm publishes none")
    async with stage(w0, w1, router=guessing) as playing:
        for _ in range(4):
            assert (await playing.complete(LONG, max_tokens=4)).status_code == 200
        assert not w0.turns
    assert sorted([len(w0.submits), len(w1.submits)]) == [0, 4], "it learns from its own choices"


async def test_a_worker_that_comes_back_holds_nothing_until_it_says_so(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    w0, w1 = pair(checkpoint, tokenizer)
    ids = tokenizer.encode(LONG).ids
    async with stage(w0, w1, router=KV) as playing:
        w1.store(ids)
        address = msgspec.structs.replace(w1.record.address, incarnation="2")
        again = Publisher(checkpoint, "w1", Role.AGGREGATED, address=address)
        again.script = w1.script
        playing.plane.add(again)
        w1.lose()
        playing.discovery.show(w0.record, again.record)
        await playing.until(lambda: again.turns and playing.fleet.models[MODEL].whole)
        told = await playing.client.post("/router/explain", json={"model": MODEL, "prompt": LONG})
        assert told.json()["maker"]["overlap_tokens"] == 0


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_both_workers_of_a_chain_are_chosen_by_what_they_hold(
    checkpoint: Path, tokenizer: Tokenizer, strategy: Strategy
) -> None:
    prefills = [Publisher(checkpoint, f"p{at}", Role.PREFILL) for at in range(2)]
    decodes = [Publisher(checkpoint, f"d{at}", Role.DECODE, *prefills) for at in range(2)]
    ids = tokenizer.encode(LONG).ids
    short = tokenizer.encode("Hello").ids
    async with stage(*prefills, *decodes, router=KV, strategy=strategy) as playing:
        await playing.until(
            lambda: all(one.ready_pairs for one in playing.fleet.models[MODEL].makers)
        )
        for one in prefills:
            one.script = lambda _worker, submit: next(
                d for d in decodes if d.record.address == submit.decode
            ).answer(submit, short)
        for one in decodes:
            one.script = lambda worker, submit: worker.answer(submit, short)
        prefills[1].store(ids)
        decodes[0].store(ids[:32])
        for _ in range(3):
            response = await playing.client.post(
                "/v1/completions",
                json={"model": MODEL, "prompt": LONG, "max_tokens": 4},
                headers={"x-trtllm-launch-explain": "1"},
            )
            assert response.status_code == 200
            route = response.headers["x-trtllm-launch-route"]
            assert f"strategy={strategy}" in route
            assert "prefill=p1 (overlap" in route
            assert "decode=d0 (overlap" in route
        answer_id = response.json()["id"]
        told = (await playing.client.get(f"/router/decisions/{answer_id}")).json()
        assert told["prefill"]["worker_id"] == "p1"
        assert told["maker"]["candidates"][0]["worker_id"] == "d0"
        assert {one["worker_id"] for one in told["prefill"]["candidates"]} == {"p0", "p1"}
    if strategy is Strategy.PREFILL_FIRST:
        assert [len(one.submits) for one in (*prefills, *decodes)] == [0, 3, 0, 0]
        assert prefills[1].submits[0].decode == decodes[0].record.address
    else:
        assert [len(one.submits) for one in (*prefills, *decodes)] == [0, 0, 3, 0]
        assert decodes[0].submits[0].prefill == prefills[1].record.address


async def test_what_decode_holds_may_make_prefill_needless(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    prefill = Publisher(checkpoint, "p0", Role.PREFILL)
    decode = Publisher(checkpoint, "d0", Role.DECODE, prefill, max_local_prefill_length=20)
    async with stage(prefill, decode, router=KV, strategy=Strategy.PREFILL_FIRST) as playing:
        body = {"model": MODEL, "prompt": LONG}
        told = (await playing.client.post("/router/explain", json=body)).json()
        assert told["prefill"]["worker_id"] == "p0"
        decode.store(tokenizer.encode(LONG).ids)
        told = (await playing.client.post("/router/explain", json=body)).json()
        assert "prefill" not in told
        assert "few enough" in told["why_no_prefill_worker"]


async def test_a_route_is_told_only_when_asked_for_and_unknown_requests_are_said_so(
    checkpoint: Path, tokenizer: Tokenizer
) -> None:
    w0, w1 = pair(checkpoint, tokenizer)
    async with stage(w0, w1) as playing:
        assert "x-trtllm-launch-route" not in (await playing.chat()).headers
        response = await playing.client.get("/router/decisions/nobody")
        assert response.status_code == 404
        assert "no decision is kept" in response.json()["error"]["message"]
        [last, *_] = (await playing.client.get("/router/decisions")).json()["decisions"]
        assert last["maker"]["mode"] == "least_loaded"
        wrong = await playing.client.post("/router/explain", content=b"{")
        assert wrong.status_code == 400
        huge = await playing.client.post("/router/explain", content=b"x" * (17 << 20))
        assert huge.status_code == 413
        assert not w0.turns, "nobody follows events in this mode"

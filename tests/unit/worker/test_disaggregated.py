"""Prefill and decode apart, in one event loop: strategies, fallbacks, gate, pairs, ledger."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes.tiny_models import make_tiny_checkpoint
from tests.unit.worker.cluster import Cluster, cluster, prompt_of, request
from trtllm_workers.engines.base import DeliverPrefilled, Engine
from trtllm_workers.errors import EngineError, TransferFailed
from trtllm_workers.planes.messages import Fetched, Fetching, Message, Offer, PrefillAsk, Submit
from trtllm_workers.transfer.base import KvLink
from trtllm_workers.transfer.nixl import NixlTransport
from trtllm_workers.types import FinishReason, GenerateRequest, Role, TransportCard
from trtllm_workers.worker.prefill_desk import HandoffLimits

STRATEGIES = ["decode_first", "prefill_first"]
ENGINES = ["sim", "torch"]


async def both(made: Cluster, **options: Any) -> None:
    await made.add(Role.AGGREGATED, "a0")
    await made.add(Role.PREFILL, "p0", **options)
    await made.add(Role.DECODE, "d0", **options)
    await made.paired("d0", "p0")


def send(made: Cluster, strategy: str, asked: GenerateRequest, p: str = "p0", d: str = "d0") -> int:
    if strategy == "decode_first":
        return made.submit(asked, d)
    return made.submit(asked, p, d)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_tokens_equal_those_of_an_aggregated_run(
    tmp_path: Path, strategy: str, engine: str
) -> None:
    """Prompts within a block, on its border, over several steps; prefix hits on the second round."""
    async with cluster(tmp_path, engine) as made:
        await both(made)
        for _round in range(2):
            asked = [request(prompt_of(n, n)) for n in (1, 7, 8, 9, 64, 65, 200)]
            streams = [send(made, strategy, one) for one in asked]
            for stream, one in zip(streams, asked, strict=True):
                assert await made.answer(stream) == await made.expected(one, "a0")
        decode = made.nodes["d0"]
        assert decode.fallbacks() == {}
        assert made.nodes["p0"].ended()["released", "fetched"] == 2 * len(asked) + 1
        await made.idle()


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_a_first_token_that_is_the_last_hands_over_nothing(
    tmp_path: Path, strategy: str
) -> None:
    async with cluster(tmp_path) as made:
        await both(made)
        asked = request(prompt_of(1, 30), max_tokens=1)
        assert await made.answer(send(made, strategy, asked)) == await made.expected(asked, "a0")
        assert made.nodes["p0"].service.meters.offered == 1  # the canary's alone
        await made.idle()


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_workers_join_and_leave_while_requests_flow(tmp_path: Path, strategy: str) -> None:
    async with cluster(tmp_path) as made:
        await both(made)
        asked = [request(prompt_of(n, 20 + n), max_tokens=40) for n in range(12)]
        streams = [send(made, strategy, one) for one in asked[:4]]
        await made.add(Role.PREFILL, "p1")
        await made.add(Role.DECODE, "d1")
        for decode in ("d0", "d1"):
            await made.paired(decode, "p1")
        streams += [send(made, strategy, one, "p1", "d1") for one in asked[4:8]]
        for stream, one in zip(streams[:4], asked[:4], strict=True):
            assert await made.answer(stream) == await made.expected(one, "a0")
        await made.kill("p0")
        streams += [send(made, strategy, one, "p1", "d0") for one in asked[8:]]
        for stream, one in zip(streams, asked, strict=True):
            assert await made.answer(stream) == await made.expected(one, "a0")
        await made.idle()


async def test_prefill_workers_take_turns(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.add(Role.PREFILL, "p0")
        await made.add(Role.PREFILL, "p1")
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0")
        await made.paired("d0", "p1")
        for number in range(6):
            await made.answer(made.submit(request(prompt_of(number, 20)), "d0"))
        for prefill in ("p0", "p1"):
            assert made.nodes[prefill].service.meters.offered == 4  # three and a canary


async def test_a_short_uncached_part_is_computed_by_decode(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.add(Role.PREFILL, "p0")
        await made.add(Role.DECODE, "d0", max_local=16)
        await made.paired("d0", "p0")
        offered = made.nodes["p0"].service.meters

        long_one = request(prompt_of(1, 40))
        await made.answer(made.submit(request(prompt_of(2, 16)), "d0"))
        assert offered.offered == 1  # the canary's: 16 tokens stay here
        await made.answer(made.submit(long_one, "d0"))
        assert offered.offered == 2
        await made.answer(made.submit(request([*long_one.prompt_token_ids, 9, 9]), "d0"))
        assert offered.offered == 2  # 42 tokens, but all except a few lie in decode's cache
        assert made.nodes["d0"].service.meters.local == 2


async def test_decode_computes_the_prompt_when_there_is_no_prefill_worker(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.add(Role.DECODE, "d0")
        asked = request(prompt_of(1, 40))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "d0")
        assert made.nodes["d0"].fallbacks() == {"no_prefill_worker": 1}


class Refusing:
    """An engine that cannot prefill for others once ``broken``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prefill(self, asked: GenerateRequest, deliver: DeliverPrefilled) -> None:
        if self.broken:
            raise EngineError("no more of these")
        self._engine.prefill(asked, deliver)


async def test_decode_computes_the_prompt_when_prefill_refuses(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        engines: list[Refusing] = []

        def wrap(engine: Engine) -> Engine:
            engines.append(Refusing(engine))
            return engines[0]

        await made.add(Role.PREFILL, "p0", wrap=wrap)
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0")
        engines[0].broken = True
        asked = request(prompt_of(1, 40))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "d0")
        assert made.nodes["d0"].fallbacks() == {"prefill_refused": 1}


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_an_offer_that_nobody_fetches_expires_and_is_told(
    tmp_path: Path, strategy: str
) -> None:
    """Decode does not read in time: prefill's pins end, and decode does not use what it has."""
    limits = HandoffLimits(min_timeout_s=0.2)
    async with cluster(tmp_path) as made:
        await both(made, limits=limits)
        decode, prefill = made.nodes["d0"], made.nodes["p0"]
        pair = decode.service.pairs.take(request([1])) if decode.service.pairs else None
        assert pair is not None
        assert pair.link is not None
        read = pair.link.read
        expired = asyncio.Event()

        async def late(remote: list[int], local: list[int], timeout_s: float) -> None:
            async with asyncio.timeout(5):
                while not prefill.ended().get(("expired", "deadline")):  # noqa: ASYNC110 - a count
                    await asyncio.sleep(0.01)
            await read(remote, local, 5.0)
            expired.set()

        pair.link.read = late  # type: ignore[method-assign, assignment]
        asked = request(prompt_of(3, 40))
        stream = send(made, strategy, asked)
        await made.client.until(lambda: stream in made.client.last)
        last = made.client.last[stream]
        if strategy == "decode_first":
            assert made.client.tokens[stream] == await made.expected(asked, "a0")
            assert decode.fallbacks() == {"handoff_expired": 1}
        else:  # the ingress moves such a stream; nobody else goes on with it
            assert last.error_code == "handoff_expired"
            assert "5 KV blocks waited" in (last.error_message or "")
        async with asyncio.timeout(5):
            await expired.wait()
        await made.idle()


async def test_a_read_that_fails_is_made_up_for_here(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await both(made)
        decode = made.nodes["d0"]
        pair = decode.service.pairs.take(request([1])) if decode.service.pairs else None
        assert pair is not None
        assert pair.link is not None
        await pair.link.close()
        asked = request(prompt_of(3, 40))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "a0")
        assert decode.fallbacks() == {"transfer_failed": 1}
        assert made.nodes["p0"].ended()["released", "transfer_failed"] == 1
        await made.idle()


@pytest.mark.parametrize(
    ("strategy", "behind"),
    [
        *(("decode_first", one) for one in (Submit, PrefillAsk, Offer, Fetching, "read", Fetched)),
        *(("prefill_first", one) for one in (Submit, Offer, Fetching, "read", Fetched)),
    ],
)
async def test_a_prefill_worker_lost_at_any_point_costs_no_answer(
    tmp_path: Path, strategy: str, behind: Any
) -> None:
    """It goes right behind a message of the handoff, or in the middle of the read."""
    async with cluster(tmp_path) as made:
        await both(made)
        asked = request(prompt_of(3, 90))
        expected = await made.expected(asked, "a0")
        decode = made.nodes["d0"]
        pair = decode.service.pairs.take(request([1])) if decode.service.pairs else None
        assert pair is not None
        assert pair.link is not None
        read = pair.link.read
        killed: list[asyncio.Task[None]] = []

        async def cut(remote: list[int], local: list[int], timeout_s: float) -> None:
            if behind == "read":
                await made.kill("p0")
            await read(remote, local, timeout_s)

        pair.link.read = cut  # type: ignore[method-assign, assignment]

        def hook(message: Message) -> None:
            if behind != "read" and isinstance(message, behind) and not killed:
                killed.append(asyncio.create_task(made.kill("p0")))

        made.after_message = hook
        stream = send(made, strategy, asked)
        if strategy == "prefill_first" and behind is Submit:
            # Decode never hears of it: the ingress sees that prefill is lost, and moves the stream.
            await made.client.until(lambda: "p0" in made.client.lost)
            assert stream not in made.client.last
        else:
            assert await made.answer(stream) == expected
        await asyncio.gather(*killed)
        await made.idle()


async def test_a_prefill_worker_of_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    other = make_tiny_checkpoint(tmp_path / "other", seed=7)
    async with cluster(tmp_path) as made:
        p0 = await made.add(Role.PREFILL, "p0", model_path=other)
        d0 = await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0", "refused")
        reason = made.client.stats["d0"].pairs[0].reason
        assert p0.info.model_id in reason
        assert d0.info.model_id in reason


async def test_the_best_transport_that_reaches_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``auto``: both have nixl and tcp, but nixl has no wire between them."""
    async with cluster(tmp_path, transport="nixl,tcp") as made:
        await made.add(Role.PREFILL, "p0")
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0")
        assert made.client.stats["d0"].pairs[0].transport == "nixl"

    async def no_wire(_self: NixlTransport, _card: TransportCard, _timeout_s: float) -> KvLink:
        raise TransferFailed("no wire to it")

    monkeypatch.setattr(NixlTransport, "connect", no_wire)
    async with cluster(tmp_path / "again", transport="nixl,tcp") as made:
        await made.add(Role.PREFILL, "p0")
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0")
        assert made.client.stats["d0"].pairs[0].transport == "tcp"


async def test_workers_without_a_common_transport_are_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.add(Role.PREFILL, "p0", transport="tcp")
        await made.add(Role.DECODE, "d0", transport="nixl")
        await made.paired("d0", "p0", "refused")
        reason = made.client.stats["d0"].pairs[0].reason
        assert "p0 moves KV by tcp, d0 by nixl" in reason
        assert "--kv-transport" in reason


async def test_a_record_of_an_older_life_is_no_pair(tmp_path: Path) -> None:
    """A restarted worker has another incarnation; nobody hands over to the one that was."""
    async with cluster(tmp_path) as made:
        p0 = await made.add(Role.PREFILL, "p0")
        address = msgspec.structs.replace(p0.record.address, incarnation="0" * 24, peer_id="p9")
        old = msgspec.structs.replace(p0.record, worker_id="p9", address=address)
        made.discovery.put(old)
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p9", "lost")
        await made.paired("d0", "p0")
        before = msgspec.structs.replace(made.nodes["d0"].mesh.address, incarnation="0" * 24)
        peer = made.client.mesh.peer(p0.mesh.address)
        assert peer is not None
        peer.send(Submit(77, request(prompt_of(1, 9)), made.client.mesh.address, before))
        await made.client.until(lambda: 77 in made.client.last)
        assert made.client.last[77].error_code == "worker_lost"
        assert "is not connected to this prefill worker" in str(made.client.last[77].error_message)


async def test_other_block_sizes_are_refused_with_both_values(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.add(Role.PREFILL, "p0", kv_cache_config__tokens_per_block=16)
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0", "refused")
        assert "block_size is 16 here and 8 there" in made.client.stats["d0"].pairs[0].reason


class WrongBlocks:
    """An engine whose pinned blocks are not what it says: the KV of another prompt."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def prefill(self, asked: GenerateRequest, deliver: DeliverPrefilled) -> None:
        def spoilt(prefilled: Any) -> None:
            pool = self._engine.kv_pool
            assert pool is not None
            for block_id in prefilled.block_ids:
                block = pool.block(block_id)
                block[:] = bytes(len(block))
            deliver(prefilled)

        self._engine.prefill(asked, spoilt)


@pytest.mark.parametrize("engine", ENGINES)
async def test_wrong_tokens_take_the_pair_out(tmp_path: Path, engine: str) -> None:
    async with cluster(tmp_path, engine) as made:
        await made.add(Role.PREFILL, "p0", wrap=WrongBlocks)
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0", "mismatch")
        asked = request(prompt_of(1, 40))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "d0")
        assert made.nodes["d0"].fallbacks() == {"no_prefill_worker": 1}
        pair = made.client.stats["d0"].pairs[0]
        assert pair.canary_mismatched == 1
        assert "an aggregated run gives" in pair.reason


@pytest.mark.parametrize("transport", ["tcp", "nixl", "ucx"])
async def test_a_new_pair_has_a_rate_and_holds_no_block_for_it(
    tmp_path: Path, transport: str
) -> None:
    async with cluster(tmp_path, "torch", transport) as made:
        await made.add(Role.PREFILL, "p0")
        await made.add(Role.DECODE, "d0")
        await made.paired("d0", "p0")
        pair = made.client.stats["d0"].pairs[0]
        assert pair.gb_per_s > 0.001
        assert pair.num_handoffs == 1, "the gate's probe; the measurement is none"
        await made.idle()


async def test_the_canary_comes_again(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        await made.add(Role.PREFILL, "p0")
        node = await made.add(Role.DECODE, "d0", canary_interval_s=0.01)

        def passed() -> int:
            assert node.service.pairs is not None
            return sum(pair.canary_passed for pair in node.service.pairs.stats())

        async with asyncio.timeout(10):
            while passed() < 3:  # noqa: ASYNC110 - a count
                await asyncio.sleep(0.01)


async def test_a_leak_is_found_named_and_taken_back(tmp_path: Path) -> None:
    async with cluster(tmp_path) as made:
        node = await made.add(Role.PREFILL, "p0")
        pinned = asyncio.Event()
        lost = request(prompt_of(1, 40))
        node.engine.prefill(lost, lambda _prefilled: pinned.set())  # nobody stands for it
        async with asyncio.timeout(5):
            await pinned.wait()
        assert await node.ledger.check() == {"r": 5}
        assert node.service.meters.leaked_blocks == 5
        assert await node.engine.holdings() == {}


SLOW = "decode:\n  base_ms: 5\nprefill:\n  base_ms: 5\n"


@pytest.mark.parametrize(
    ("strategy", "behind"),
    [
        ("decode_first", None),
        ("decode_first", PrefillAsk),
        ("decode_first", Offer),
        ("decode_first", Fetched),
        ("prefill_first", None),
        ("prefill_first", Submit),
        ("prefill_first", Offer),
        ("prefill_first", Fetched),
    ],
)
async def test_an_abort_in_any_phase_leaves_no_block(
    tmp_path: Path, strategy: str, behind: type | None
) -> None:
    """The abort rides right behind a message of the handoff."""
    cost = tmp_path / "cost.yaml"
    cost.write_text(SLOW)
    async with cluster(tmp_path) as made:
        await both(made, extra={"cost_path": str(cost)})
        sent: list[int] = []

        def hook(message: Message) -> None:
            if behind is not None and isinstance(message, behind) and sent:
                made.abort(sent[0], "p0", "d0")

        made.after_message = hook
        sent.append(send(made, strategy, request(prompt_of(3, 90), max_tokens=200)))
        if behind is None:
            made.abort(sent[0], "p0", "d0")
        await made.client.until(lambda: sent[0] in made.client.last)
        assert made.client.last[sent[0]].finish_reason is FinishReason.ABORT
        await made.idle()


@pytest.mark.parametrize("engine", ENGINES)
async def test_2000_aborts_at_random_moments_leave_no_block(tmp_path: Path, engine: str) -> None:
    """Both strategies at once, prompts of all lengths, a pool that is often full."""
    dice = random.Random(20261121)
    cost = tmp_path / "cost.yaml"
    cost.write_text("decode:\n  base_ms: 1\nprefill:\n  per_token_us: 20\n")
    options = {"cost_path": str(cost)} if engine == "sim" else {"num_threads": "1"}
    async with cluster(tmp_path, engine) as made:
        for worker_id, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL), ("d0", Role.DECODE)):
            await made.add(role, worker_id, extra=options, kv_cache_config__max_tokens=2048)
        for prefill in ("p0", "p1"):
            await made.paired("d0", prefill)
        flying: list[tuple[int, str]] = []
        ended = 0
        while ended < 2000:
            while len(flying) < 24:
                prefill = dice.choice(("p0", "p1"))
                asked = request(prompt_of(dice.randrange(40), dice.randrange(1, 250)), 40)
                first, decode = dice.choice((("d0", None), (prefill, "d0")))
                flying.append((made.submit(asked, first, decode), prefill))
            if dice.random() < 0.5:  # some aborts come at once, some in the middle of things
                await made.client.happened()
            stream, prefill = flying.pop(dice.randrange(len(flying)))
            made.abort(stream, prefill, "d0")
            ended += 1
        for stream, prefill in flying:
            made.abort(stream, prefill, "d0")
        await made.idle()
        ends = {cause for prefill in ("p0", "p1") for _, cause in made.nodes[prefill].ended()}
        assert {"fetched", "aborted"} <= ends, "the storm must meet handoffs in every state"
        for node in made.nodes.values():
            assert node.held_blocks == 0
            assert node.service.meters.leaked_blocks == 0
        # The workers are as good as before.
        asked = request(prompt_of(99, 100))
        assert await made.answer(made.submit(asked, "d0")) == await made.expected(asked, "d0")

"""Images on their way between workers: real meshes and transports; what is read, and by whom."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.fakes.queue import MemoryQueue, MemoryQueueHub
from tests.unit.worker.cluster import ACK_WAIT_S
from tests.unit.worker.media_cluster import (
    CAT,
    CONTENTS,
    DOG,
    TRANSPORTS,
    Gate,
    chain,
    media_stats,
    seen,
    stage,
)
from tests.unit.worker.media_stage import (
    ROW_BYTES,
    make_store,
    pattern,
    request_with,
)
from trtllm_workers.planes.media_messages import (
    EncodeFailed,
)
from trtllm_workers.planes.messages import StatsAsk
from trtllm_workers.types import Role

# --- bytes move ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_aggregated_worker_reads_what_an_encode_worker_made(
    tmp_path: Path, transport: str
) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0", media_transport=transport)
        agg = await on.add(Role.AGGREGATED, "a0", media_transport=transport)
        items = await on.items("e0", CAT, DOG)
        for number in range(3):
            await on.made.answer(on.made.submit(request_with(items, number), "a0"))
        assert seen(agg) == [CONTENTS] * 3
        stats = media_stats(agg)
        (flow,) = stats.flows  # the first one's; later ones found it here
        assert (flow.peer, flow.transport, flow.num_fetches) == ("e0", transport, 1)
        assert flow.num_bytes == sum(map(len, CONTENTS))
        assert flow.wire
        assert flow.seconds > 0
        assert (stats.num_hits, stats.num_misses) == (4, 2)
        await on.settled()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_large_embeddings_arrive_whole_in_scattered_blocks(
    tmp_path: Path, transport: str
) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0", media_transport=transport, store=make_store(4096, 16))
        store = make_store(4096, 16)
        holes = [store.claim(ROW_BYTES) for _ in range(60)]
        for hole in holes[::2]:
            store.drop(hole)
        agg = await on.add(Role.AGGREGATED, "a0", media_transport=transport, store=store)
        items = await on.items("e0", "rows:huge:301", "rows:other:44")
        await on.made.answer(on.made.submit(request_with(items, text=1), "a0"))
        (contents,) = seen(agg)
        assert contents == [
            pattern(b"huge\0", 301 * ROW_BYTES),
            pattern(b"other\0", 44 * ROW_BYTES),
        ]
        for hole in holes[1::2]:
            store.drop(hole)
        await on.settled()


async def test_a_worker_that_made_the_items_moves_nothing(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        agg = await on.add(Role.AGGREGATED, "a0")
        items = await on.items("a0", CAT, DOG)
        await on.made.answer(on.made.submit(request_with(items), "a0"))
        assert seen(agg) == [CONTENTS]
        assert media_stats(agg).flows == []
        await on.settled()


async def test_an_item_that_is_passed_on_keeps_its_content_and_gets_a_new_holder(
    tmp_path: Path,
) -> None:
    """An aggregated worker has it from an encode worker, and later is asked for it itself."""
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0")
        (there,) = await on.items("e0", DOG)
        await on.made.answer(on.made.submit(request_with([there]), "a0"))
        (here,) = await on.items("a0", DOG)
        assert here.digest == there.digest
        assert here.holder == agg.mesh.address
        assert here.offset == 0
        await on.settled()


async def test_requests_that_want_one_item_at_once_read_it_once(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0", wrap_media=gate.transport)
        items = await on.items("e0", CAT, DOG)
        streams = [
            on.made.submit(request_with(picked, number), "a0")
            for number, picked in enumerate([items, items[:1], items[1:], items])
        ]
        async with asyncio.timeout(20):
            await gate.reading.wait()
        gate.open.set()
        for stream in streams:
            await on.made.answer(stream)
        (flow,) = media_stats(agg).flows
        assert flow.num_fetches == 1
        assert gate.num_links == 1
        await on.settled()


async def test_the_same_image_twice_in_a_prompt_comes_once(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0")
        (cat,) = await on.items("e0", CAT)
        await on.made.answer(on.made.submit(request_with([cat, cat]), "a0"))
        assert seen(agg) == [[CONTENTS[0]] * 2]
        assert media_stats(agg).flows[0].num_bytes == len(CONTENTS[0])
        await on.settled()


# --- disaggregated -------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["decode_first", "prefill_first"])
async def test_the_prefill_worker_reads_the_images_and_decode_none(
    tmp_path: Path, strategy: str
) -> None:
    async with stage(tmp_path) as on:
        await chain(on)
        items = await on.items("e0", CAT, DOG)
        asked = request_with(items)
        expected = await on.made.answer(on.made.submit(asked, "a0"))
        to = ("d0",) if strategy == "decode_first" else ("p0", "d0")
        assert await on.made.answer(on.made.submit(asked, *to)) == expected
        assert seen(on.made.nodes["p0"]) == [CONTENTS]
        assert seen(on.made.nodes["d0"]) == []
        assert on.made.nodes["d0"].fallbacks() == {}
        await on.settled()


async def test_decode_reads_the_images_of_a_prompt_that_it_computes_itself(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await chain(on, max_local=10_000)
        items = await on.items("e0", CAT, DOG)
        asked = request_with(items)
        expected = await on.made.answer(on.made.submit(asked, "a0"))
        assert await on.made.answer(on.made.submit(asked, "d0")) == expected
        assert seen(on.made.nodes["d0"]) == [CONTENTS]
        assert seen(on.made.nodes["p0"]) == []
        await on.settled()


async def test_decode_reads_the_images_when_the_handoff_fails(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        decode = await on.add(Role.DECODE, "d0")
        items = await on.items("e0", CAT, DOG)
        await on.made.answer(on.made.submit(request_with(items), "d0"))
        assert seen(decode) == [CONTENTS]
        assert decode.fallbacks() == {"no_prefill_worker": 1}
        await on.settled()


async def test_an_abort_ends_a_fallback_that_waits_for_images(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        decode = await on.add(Role.DECODE, "d0", wrap_media=gate.transport)
        items = await on.items("e0", CAT)
        stream = on.made.submit(request_with(items), "d0")
        async with asyncio.timeout(20):
            await gate.reading.wait()
        assert decode.service.num_streams == 1
        assert await decode.ledger.check() == {}  # its blocks are owned meanwhile
        on.made.abort(stream, "d0")
        await on.aborted(stream)
        await on.settled()


async def test_a_prompt_of_the_prefill_queue_brings_its_images(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        hub = MemoryQueueHub(ack_wait_s=ACK_WAIT_S)
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.AGGREGATED, "a0")
        prefill = await on.add(Role.PREFILL, "p0", queue=MemoryQueue(hub))
        decode = await on.add(Role.DECODE, "d0", queue=MemoryQueue(hub))
        await on.made.paired("d0", "p0")
        items = await on.items("e0", CAT, DOG)
        asked = request_with(items)
        expected = await on.made.answer(on.made.submit(asked, "a0"))
        assert await on.made.answer(on.made.submit(asked, "d0")) == expected
        assert seen(prefill) == [CONTENTS]
        assert seen(decode) == []
        assert dict(decode.service.meters.counts().queue_jobs) == {"filled": 1}
        await on.settled()


async def test_a_prefill_that_cannot_get_the_images_is_made_up_for_by_decode(
    tmp_path: Path,
) -> None:
    """The prefill worker has no room for them; decode has."""
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.PREFILL, "p0", store=make_store(2))
        decode = await on.add(Role.DECODE, "d0")
        await on.made.paired("d0", "p0")
        items = await on.items("e0", CAT, DOG)
        await on.made.answer(on.made.submit(request_with(items), "d0"))
        assert seen(decode) == [CONTENTS]
        assert decode.fallbacks() == {"prefill_refused": 1}
        await on.settled()


# --- the encode role -----------------------------------------------------------------------------


async def test_an_encode_worker_computes_no_prompt(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        code, message = await on.failure(on.made.submit(request_with([]), "e0"))
        assert code == "invalid_value"
        assert "role encode" in message


async def test_a_worker_that_makes_no_items_says_so(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.DECODE, "d0")
        number = on.ask("d0", CAT)
        await on.made.client.until(lambda: number in on.made.client.encoded)
        failed = on.made.client.encoded[number]
        assert isinstance(failed, EncodeFailed)
        assert failed.code == "unsupported_parameter"


async def test_a_draining_holder_still_gives_what_it_has_made(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        holder = await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0")
        items = await on.items("e0", CAT)
        holder.service.drain("it was told to stop")
        assert holder.service.num_streams == 1
        await on.made.answer(on.made.submit(request_with(items), "a0"))
        assert seen(agg) == [[CONTENTS[0]]]
        await on.settled()


async def test_counts_are_told_to_who_asks(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.AGGREGATED, "a0")
        items = await on.items("e0", CAT, DOG)
        await on.made.answer(on.made.submit(request_with(items), "a0"))
        on.made.client.stats.clear()
        for worker_id in ("e0", "a0"):
            on._peer(worker_id).send(StatsAsk())
        await on.made.client.until(lambda: len(on.made.client.stats) == 2)
        encode, agg = (on.made.client.stats[name].media for name in ("e0", "a0"))
        assert encode is not None
        assert agg is not None
        assert dict(encode.items) == {"encoded": 1, "taken": 1}
        assert encode.num_pinned == 2
        assert agg.flows[0].peer == "e0"
        assert agg.num_misses == 2

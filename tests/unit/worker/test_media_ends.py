"""How the way of an image between workers ends otherwise: aborts, losses, refusals; what stays behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes.queue import MemoryQueue, MemoryQueueHub
from tests.unit.worker.cluster import ACK_WAIT_S
from tests.unit.worker.media_cluster import (
    CAT,
    CONTENTS,
    DOG,
    Gate,
    at_rest,
    engine_of,
    media_stats,
    parts,
    seen,
    stage,
)
from tests.unit.worker.media_stage import (
    make_store,
    request_with,
    until,
)
from trtllm_workers.errors import TransferFailed
from trtllm_workers.planes.media_messages import (
    MediaAsk,
    MediaGrant,
    MediaReleased,
)
from trtllm_workers.planes.messages import Message, Submit
from trtllm_workers.types import Address, MediaItem, Role
from trtllm_workers.worker.prefill_desk import HandoffLimits


async def test_items_that_are_gone_are_told_so_that_they_can_be_made_again(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0", store=make_store(4))
        agg = await on.add(Role.AGGREGATED, "a0", store=make_store(4))
        (there,) = await on.items("e0", DOG)
        (here,) = await on.items("a0", "rows:owl:16")
        on.all_done()
        for worker_id in ("e0", "a0"):
            await at_rest(on.made.nodes[worker_id])
            await on.items(worker_id, "rows:other:16")  # which takes all the room
        on.all_done()
        await at_rest(agg)
        for item in (there, here):
            code, message = await on.failure(on.made.submit(request_with([item]), "a0"))
            assert code == "media_gone"
            assert "any more" in message
        assert engine_of(agg).seen == []
        await on.settled()


async def test_a_holder_of_an_earlier_life_is_gone(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.AGGREGATED, "a0")
        (item,) = await on.items("e0", DOG)
        holder = item.holder
        assert holder is not None
        for stranger in (
            msgspec.structs.replace(holder, incarnation="0" * 24),
            Address("127.0.0.1", 1, "nobody", "1"),
        ):
            moved = msgspec.structs.replace(item, holder=stranger)
            code, _ = await on.failure(on.made.submit(request_with([moved]), "a0"))
            assert code == "media_gone"
        lost = msgspec.structs.replace(item, holder=None)
        code, _ = await on.failure(on.made.submit(request_with([lost]), "a0"))
        assert code == "engine_error"
        await on.settled()


@pytest.mark.parametrize("phase", [MediaAsk, MediaGrant, "reading", MediaReleased])
async def test_a_request_is_aborted_in_every_phase(tmp_path: Path, phase: Any) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0", wrap_media=gate.transport)
        items = await on.items("e0", CAT, DOG)
        aborts: list[int] = []

        def at(message: Message) -> None:
            if phase != "reading" and isinstance(message, phase):
                (out,) = agg.service._lines.values()
                for stream in list(out.streams.values()):
                    agg.service._abort_request(stream.request_id)
                    aborts.append(stream.stream)

        on.made.after_message = at
        if phase != "reading":
            gate.open.set()
        stream = on.made.submit(request_with(items), "a0")
        if phase == "reading":
            async with asyncio.timeout(20):
                await gate.reading.wait()
            on.made.abort(stream, "a0")
        await on.aborted(stream)
        assert aborts == ([stream] if phase != "reading" else [])
        assert engine_of(agg).seen == []
        on.made.after_message = lambda _message: None
        gate.open.set()
        await on.settled()
        again = on.made.submit(request_with(items, 1), "a0")
        await on.made.answer(again)
        assert seen(agg) == [CONTENTS]
        await on.settled()


async def test_one_of_two_that_wait_is_aborted_and_the_other_goes_on(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0", wrap_media=gate.transport)
        items = await on.items("e0", CAT)
        first = on.made.submit(request_with(items, 1), "a0")
        second = on.made.submit(request_with(items, 2), "a0")
        async with asyncio.timeout(20):
            await gate.reading.wait()
        await until(lambda: agg.service.num_streams == 2)
        on.made.abort(first, "a0")
        await on.aborted(first)
        gate.open.set()
        await on.made.answer(second)
        await on.settled()


@pytest.mark.parametrize("phase", ["answer", "reading"])
async def test_a_holder_that_dies_ends_the_request_at_once(tmp_path: Path, phase: str) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0", wrap_media=gate.transport)
        items = await on.items("e0", CAT)
        if phase == "answer":
            on.made.nodes["e0"].service.media.on_message = lambda *_: True  # type: ignore[method-assign, union-attr]
        streams = [on.made.submit(request_with(items, number), "a0") for number in range(2)]
        if phase == "reading":
            async with asyncio.timeout(20):
                await gate.reading.wait()
        await until(lambda: agg.service.num_streams == 2)
        await on.made.kill("e0")
        for stream in streams:
            code, message = await on.failure(stream)
            assert code == "media_gone"
            assert "e0" in message
        gate.open.set()
        await on.settled()
        await until(lambda: parts(agg)[1].fetcher.num_links == 0)
        assert gate.num_closed == gate.num_links
        assert media_stats(agg).failures == [("fetch", "media_gone", 1)]


async def test_an_ingress_that_is_lost_leaves_no_fetch_behind(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        holder = await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0", wrap_media=gate.transport)
        items = await on.items("e0", CAT)
        on.made.submit(request_with(items), "a0")
        async with asyncio.timeout(20):
            await gate.reading.wait()
        await on.made.client.mesh.close()
        for node in (agg, holder):
            await at_rest(node)
            assert node.service.num_streams == 0


async def test_a_read_that_fails_is_told_and_the_next_one_connects_anew(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0", wrap_media=gate.transport)
        items = await on.items("e0", CAT)
        gate.error = TransferFailed("the wire broke")
        gate.open.set()
        code, message = await on.failure(on.made.submit(request_with(items), "a0"))
        assert code == "media_gone"
        assert "the wire broke" in message
        gate.error = None
        await on.made.answer(on.made.submit(request_with(items), "a0"))
        await until(lambda: (gate.num_links, gate.num_closed) == (2, 1))
        assert seen(agg) == [[CONTENTS[0]]]
        await on.settled()


async def test_what_was_read_too_late_is_not_used(tmp_path: Path) -> None:
    """The holder's pins end before the reader is done: it is told, and what was read is void."""
    async with stage(tmp_path) as on:
        gate = Gate()
        holder = await on.add(Role.ENCODE, "e0", limits=HandoffLimits(min_timeout_s=0.1))
        agg = await on.add(Role.AGGREGATED, "a0", wrap_media=gate.transport)
        items = await on.items("e0", CAT)
        stream = on.made.submit(request_with(items), "a0")
        async with asyncio.timeout(20):
            await gate.reading.wait()
        await until(lambda: not parts(holder)[1].num_open)
        gate.open.set()
        code, _ = await on.failure(stream)
        assert code == "media_gone"
        assert parts(agg)[0].num_entries == 0
        await on.settled()


async def test_workers_of_different_models_do_not_mix_rows(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        agg = await on.add(Role.AGGREGATED, "a0", store=make_store(64, 8))
        items = await on.items("e0", CAT)
        code, message = await on.failure(on.made.submit(request_with(items), "a0"))
        assert code == "layout_mismatch"
        assert "same model" in message
        assert seen(agg) == []
        await on.settled()


async def test_workers_without_a_common_transport_say_which_they_have(tmp_path: Path) -> None:
    pytest.importorskip("ucxx")
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0", media_transport="ucx")
        await on.add(Role.AGGREGATED, "a0", media_transport="tcp")
        items = await on.items("e0", CAT)
        code, message = await on.failure(on.made.submit(request_with(items), "a0"))
        assert code == "layout_mismatch"
        assert "ucx" in message
        assert "--kv-transport" in message


async def test_an_engines_handle_is_good_on_its_own_host(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        agg = await on.add(Role.AGGREGATED, "a0")
        here = MediaItem(b"h" * 16, 0, 4, holder=agg.mesh.address, native=b"handle")
        far = msgspec.structs.replace(
            here, holder=msgspec.structs.replace(agg.mesh.address, host="10.1.2.3", peer_id="e9")
        )
        media = parts(agg)[1]
        async with media.here([here]):
            pass
        code, message = await on.failure(on.made.submit(request_with([far]), "a0"))
        assert code == "unsupported_parameter"
        assert "one node" in message


async def test_what_the_engine_refuses_is_told_and_unpinned(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.AGGREGATED, "a0")
        items = await on.items("e0", CAT)
        for _ in range(2):  # fetched, then here
            stream = on.made.submit(request_with(items, max_tokens=99), "a0")
            _, message = await on.failure(stream)
            assert message == "99 tokens are too many"
            assert on.made.client.last[stream].error_param == "max_tokens"
        await on.settled()


async def test_no_room_for_the_images_is_overload(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.AGGREGATED, "a0", store=make_store(2))
        items = await on.items("e0", CAT, DOG)
        code, _ = await on.failure(on.made.submit(request_with(items), "a0"))
        assert code == "overloaded"
        await on.settled()


async def test_requests_without_images_wait_for_nothing(tmp_path: Path) -> None:
    """They reach the engine in the same turn of the loop, without a task."""
    async with stage(tmp_path) as on:
        agg = await on.add(Role.AGGREGATED, "a0")
        before = asyncio.all_tasks()
        peer = next(iter(agg.mesh.peers()))
        message = Submit(1, request_with([]), on.made.client.mesh.address)
        agg.service.on_message(peer, message)
        assert agg.engine.stats().num_waiting + agg.engine.stats().num_running == 1
        assert asyncio.all_tasks() == before
        await on.made.answer(1)


@pytest.mark.parametrize("strategy", ["decode_first", "prefill_first"])
async def test_an_abort_ends_a_prefill_that_waits_for_images(tmp_path: Path, strategy: str) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        prefill = await on.add(Role.PREFILL, "p0", wrap_media=gate.transport)
        await on.add(Role.DECODE, "d0")
        await on.made.paired("d0", "p0")
        items = await on.items("e0", CAT)
        to = ("d0",) if strategy == "decode_first" else ("p0", "d0")
        stream = on.made.submit(request_with(items), *to)
        async with asyncio.timeout(20):
            await gate.reading.wait()
        assert prefill.service.num_streams >= 1
        on.made.abort(stream, "p0", "d0")
        await on.aborted(stream)
        await on.settled()
        assert engine_of(prefill).seen == []


async def test_an_abort_ends_a_job_of_the_queue_that_waits_for_images(tmp_path: Path) -> None:
    async with stage(tmp_path) as on:
        gate = Gate()
        hub = MemoryQueueHub(ack_wait_s=ACK_WAIT_S)
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.PREFILL, "p0", queue=MemoryQueue(hub), wrap_media=gate.transport)
        await on.add(Role.DECODE, "d0", queue=MemoryQueue(hub))
        await on.made.paired("d0", "p0")
        items = await on.items("e0", CAT)
        stream = on.made.submit(request_with(items), "d0")
        async with asyncio.timeout(20):
            await gate.reading.wait()
        on.made.abort(stream, "d0")
        await on.aborted(stream)
        await on.settled()


@pytest.mark.parametrize("lost", ["d0", "p0"])
async def test_a_worker_of_a_chain_is_lost_while_images_are_read(tmp_path: Path, lost: str) -> None:
    """Without its decode worker a prefill is given up; without its prefill worker decode reads them."""
    async with stage(tmp_path) as on:
        gate = Gate()
        await on.add(Role.ENCODE, "e0")
        await on.add(Role.PREFILL, "p0", wrap_media=gate.transport)
        decode = await on.add(Role.DECODE, "d0")
        await on.made.paired("d0", "p0")
        items = await on.items("e0", CAT)
        stream = on.made.submit(request_with(items), "d0")
        async with asyncio.timeout(20):
            await gate.reading.wait()
        await on.made.kill(lost)
        if lost == "p0":
            await on.made.answer(stream)
            assert seen(decode) == [[CONTENTS[0]]]
        await on.settled()

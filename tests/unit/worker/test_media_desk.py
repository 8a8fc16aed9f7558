"""Images on their way between workers: real meshes and transports; what is read, and what stays behind."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes.queue import MemoryQueue, MemoryQueueHub
from tests.unit.worker.cluster import ACK_WAIT_S, Cluster, Node, cluster
from tests.unit.worker.media_stage import (
    ROW_BYTES,
    Loads,
    Sighted,
    flat,
    image_rows,
    make_store,
    pattern,
    reference,
    request_with,
    until,
)
from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import TransferFailed
from trtllm_workers.planes.media_messages import (
    EncodeAsk,
    EncodeDone,
    EncodeFailed,
    MediaAsk,
    MediaGrant,
    MediaReleased,
)
from trtllm_workers.planes.messages import Message, StatsAsk, Submit
from trtllm_workers.transfer.base import KvLink, KvTransport
from trtllm_workers.types import Address, FinishReason, MediaItem, Role, TransportCard
from trtllm_workers.worker.prefill_desk import HandoffLimits

TRANSPORTS = [
    "tcp",
    pytest.param(
        "ucx",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed"
        ),
    ),
    pytest.param(
        "nixl",
        marks=pytest.mark.skipif(
            not any(map(importlib.util.find_spec, ("nixl_cu12", "nixl_cu13"))),
            reason="nixl is not installed",
        ),
    ),
]
CAT, DOG = "image:cat:16x16", "rows:dog:7"
CONTENTS = [image_rows("cat", 16, 16), pattern(b"dog\0", 7 * ROW_BYTES)]


class Stage:
    """Workers that take images, and an ingress that asks for items."""

    def __init__(self, made: Cluster) -> None:
        self.made = made
        self.loads = Loads()
        self._asks = itertools.count(1)
        self.asks: dict[int, str] = {}

    async def add(self, role: Role, worker_id: str, **options: Any) -> Node:
        store = options.pop("store", None)

        def wrap(engine: Engine) -> Engine:
            sighted = Sighted(engine, blind=role is Role.DECODE)
            sighted.media_store = store or make_store()
            return sighted

        return await self.made.add(
            role, worker_id, wrap=wrap, loads=self.loads, max_num_tokens=512, **options
        )

    def ask(self, worker_id: str, *urls: str) -> int:
        number = next(self._asks)
        self.asks[number] = worker_id
        references = [reference(url, at) for at, url in enumerate(urls)]
        self._peer(worker_id).send(EncodeAsk(number, references, 20.0))
        return number

    async def items(self, worker_id: str, *urls: str) -> list[MediaItem]:
        number = self.ask(worker_id, *urls)
        await self.made.client.until(lambda: number in self.made.client.encoded)
        return flat(self.made.client.encoded[number])

    def _peer(self, worker_id: str) -> Any:
        peer = self.made.client.mesh.peer(self.made.nodes[worker_id].mesh.address)
        assert peer is not None
        return peer

    def all_done(self) -> None:
        """Say that no item is needed any more."""
        for number, worker_id in self.asks.items():
            if worker_id in self.made.nodes:
                self._peer(worker_id).send(EncodeDone(number))
        self.asks.clear()

    async def failure(self, stream: int) -> tuple[str, str]:
        await self.made.client.until(lambda: stream in self.made.client.last)
        last = self.made.client.last[stream]
        assert last.finish_reason is FinishReason.ERROR, last
        return last.error_code or "", last.error_message or ""

    async def aborted(self, stream: int) -> None:
        await self.made.client.until(lambda: stream in self.made.client.last)
        assert self.made.client.last[stream].finish_reason is FinishReason.ABORT

    async def settled(self) -> None:
        """Wait until nobody holds anything, of images or of KV."""
        self.all_done()
        await self.made.idle()
        for node in self.made.nodes.values():
            await at_rest(node)
            _, _, encodes = parts(node)
            assert encodes is None or encodes.num_open == 0
            assert engine_of(node).num_pinned == 0
            assert node.service.num_streams == 0


def parts(node: Node) -> Any:
    return node.engine.media_store, node.service.media, node.service.encodes


async def at_rest(node: Node) -> None:
    """Wait until no image here is held, filled, read or fetched."""
    store, media, _ = parts(node)
    await until(lambda: not store.num_pinned and not store.num_claimed_blocks)
    await until(lambda: not media.fetcher.num_open and not media.num_open)


def engine_of(node: Node) -> Any:
    return node.engine


def seen(node: Node) -> list[list[bytes]]:
    return [contents for _, contents in engine_of(node).seen]


def media_stats(node: Node) -> Any:
    return node.service.media_meters.stats(parts(node)[0])


@asynccontextmanager
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with cluster(tmp_path) as made:
        yield Stage(made)


class Gate:
    """Holds reads until it is opened, and tells that one has begun."""

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.open = asyncio.Event()
        self.num_links = 0
        self.num_closed = 0
        self.error: Exception | None = None

    def transport(self, inner: KvTransport) -> KvTransport:
        return _GatedTransport(inner, self)


class _GatedTransport:
    def __init__(self, inner: KvTransport, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate
        self.name = inner.name

    async def start(self, pool: Any) -> None:
        await self._inner.start(pool)

    def card(self) -> TransportCard:
        return self._inner.card()

    async def connect(self, card: TransportCard, timeout_s: float) -> KvLink:
        link = await self._inner.connect(card, timeout_s)
        self._gate.num_links += 1
        return _GatedLink(link, self._gate)  # type: ignore[return-value]

    async def close(self) -> None:
        await self._inner.close()


class _GatedLink:
    def __init__(self, inner: KvLink, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate
        self.peer_id, self.wire = inner.peer_id, inner.wire

    async def read(self, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> None:
        self._gate.reading.set()
        await self._gate.open.wait()
        if self._gate.error is not None:
            raise self._gate.error
        await self._inner.read(remote, local, timeout_s)

    async def close(self) -> None:
        self._gate.num_closed += 1
        await self._inner.close()


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


async def chain(on: Stage, **options: Any) -> None:
    await on.add(Role.ENCODE, "e0")
    await on.add(Role.AGGREGATED, "a0")
    await on.add(Role.PREFILL, "p0", **options)
    await on.add(Role.DECODE, "d0", **options)
    await on.made.paired("d0", "p0")


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


# --- ends ----------------------------------------------------------------------------------------


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
        else:
            await until(lambda: agg.service.num_streams == 2)
        await on.made.kill("e0")
        for stream in streams:
            code, message = await on.failure(stream)
            assert code == "media_gone"
            assert "e0" in message
        gate.open.set()
        await on.settled()
        assert gate.num_closed == gate.num_links
        assert media_stats(agg).failures == [("fetch", "media_gone", 1)]
        assert parts(agg)[1].fetcher.num_links == 0


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
        assert (gate.num_links, gate.num_closed) == (2, 1)
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

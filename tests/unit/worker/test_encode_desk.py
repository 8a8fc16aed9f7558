"""An ingress asks for items: what it is told, what is made once, and that nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from tests.unit.worker.media_stage import (
    MADE_BY,
    ROW_BYTES,
    VISION,
    Inbox,
    Loads,
    Tower,
    flat,
    image_rows,
    make_store,
    pattern,
    reference,
    until,
)
from trtllm_workers.planes.media_messages import EncodeAsk, Encoded, EncodeDone, EncodeFailed
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import Address, MediaItem, MediaKind
from trtllm_workers.worker.encode_desk import EncodeDesk
from trtllm_workers.worker.media_maker import NICENESS, ItemMaker
from trtllm_workers.worker.media_meters import MediaMeters

HERE = Address("127.0.0.1", 2, "e0", "1")
FAR_S = 30.0


@dataclass
class Desk:
    desk: EncodeDesk
    store: MediaStore
    loads: Loads
    tower: Tower
    meters: MediaMeters
    ingress: Inbox

    def ask(
        self, number: int, *urls: str, timeout_s: float = FAR_S, of: Inbox | None = None
    ) -> None:
        references = [reference(url, at) for at, url in enumerate(urls)]
        assert self.desk.on_message(of or self.ingress, EncodeAsk(number, references, timeout_s))

    def done(self, number: int, of: Inbox | None = None) -> None:
        assert self.desk.on_message(of or self.ingress, EncodeDone(number))

    async def items(self, number: int, *urls: str) -> list[MediaItem]:
        self.ask(number, *urls)
        return flat(await self.ingress.answer(number))

    async def failure(self, number: int, *urls: str, **options: Any) -> EncodeFailed:
        self.ask(number, *urls, **options)
        answer = await self.ingress.answer(number)
        assert isinstance(answer, EncodeFailed)
        return answer

    def content(self, item: MediaItem) -> bytes:
        entry = self.store.pin(item.digest)
        assert entry is not None
        self.store.unpin(entry)
        return b"".join(self.store.bytes_of(entry))

    async def empty(self) -> None:
        """Wait until nobody holds anything."""
        await until(lambda: not self.desk.num_open)
        await until(lambda: not self.store.num_pinned and not self.store.num_claimed_blocks)


@asynccontextmanager
async def desk(
    *,
    num_blocks: int = 64,
    sees: bool = True,
    vision: dict[str, Any] | None = None,
    kind: MediaKind = MediaKind.EMBEDDINGS,
    **options: Any,
) -> AsyncIterator[Desk]:
    store, loads, tower, meters = make_store(num_blocks), Loads(), Tower(kind=kind), MediaMeters()
    info = msgspec.structs.replace(VISION, **(vision or {}))
    maker = ItemMaker(loads, store, tower if sees else None, info, meters)
    made = EncodeDesk("e0", maker, store, HERE, meters, **{"max_items": 4, **options})
    try:
        yield Desk(made, store, loads, tower, meters, Inbox())
    finally:
        tower.gate.set()
        await made.close()
        assert loads.closed
        assert made.num_open == 0
        assert store.num_pinned == 0
        assert store.num_claimed_blocks == 0


async def test_an_image_and_embeddings_become_items_in_order() -> None:
    async with desk() as stage:
        stage.ask(1, "image:cat:8x12", "rows:dog:5", "image:owl:4x4")
        answer = await stage.ingress.answer(1)
        assert isinstance(answer, Encoded)
        assert [len(several) for several in answer.items] == [1, 1, 1]
        cat, dog, owl = flat(answer)
        assert [item.num_tokens for item in (cat, dog, owl)] == [6, 5, 1]
        assert all(item.holder == HERE and item.offset == 0 for item in (cat, dog, owl))
        assert stage.content(cat) == image_rows("cat", 8, 12)
        assert stage.content(dog) == pattern(b"dog\0", 5 * ROW_BYTES)
        assert answer.num_cached == 0
        assert stage.store.num_pinned == 3
        stage.done(1)
        await stage.empty()


async def test_a_file_of_several_images_gives_several_items() -> None:
    async with desk() as stage:
        stage.ask(1, "rows:stack:3x2", "image:cat:4x4")
        answer = await stage.ingress.answer(1)
        assert isinstance(answer, Encoded)
        assert [len(several) for several in answer.items] == [2, 1]
        assert len({item.digest for item in flat(answer)}) == 3


async def test_what_is_here_is_not_made_again() -> None:
    async with desk() as stage:
        first = await stage.items(1, "image:cat:8x8", "rows:dog:4")
        stage.done(1)
        await stage.empty()
        stage.ask(2, "image:cat:8x8", "rows:dog:4")
        answer = await stage.ingress.answer(2)
        assert isinstance(answer, Encoded)
        assert answer.num_cached == 2
        assert flat(answer) == first
        assert len(stage.tower.encoded) == 1
        assert stage.store.num_claimed_blocks == 0


async def test_two_asks_for_one_image_at_once_go_through_the_tower_once() -> None:
    async with desk() as stage:
        stage.tower.gate.clear()
        stage.ask(1, "image:cat:8x8", "image:cat:8x8")
        stage.ask(2, "image:cat:8x8")
        await until(stage.tower.inside.is_set)
        await until(lambda: len(stage.loads.loaded) == 3)
        stage.tower.gate.set()
        one, two = await stage.ingress.answer(1), await stage.ingress.answer(2)
        assert len({item.digest for item in flat(one) + flat(two)}) == 1
        assert len(stage.tower.encoded) == 1
        stage.done(1)
        assert stage.store.num_pinned == 1  # the other ask's
        stage.done(2)
        await stage.empty()


async def test_the_first_of_two_leaves_and_the_second_gets_the_image() -> None:
    async with desk() as stage:
        stage.tower.gate.clear()
        stage.ask(1, "image:cat:8x8")
        await until(stage.tower.inside.is_set)
        stage.ask(2, "image:cat:8x8")
        await until(lambda: len(stage.loads.loaded) == 2)
        stage.done(1)
        await until(lambda: stage.desk.num_open == 1)
        stage.tower.gate.set()
        assert len(flat(await stage.ingress.answer(2))) == 1
        assert len(stage.tower.encoded) == 1


async def test_an_image_that_nobody_wants_any_more_comes_out_of_the_tower_and_is_kept() -> None:
    async with desk() as stage:
        stage.tower.gate.clear()
        stage.ask(1, "image:cat:8x8", "image:dog:8x8", "image:owl:8x8")
        await until(stage.tower.inside.is_set)
        stage.done(1)
        await until(lambda: not stage.desk.num_open)
        stage.tower.gate.set()
        await stage.empty()
        assert len(stage.tower.encoded) == 1  # the others were not begun
        assert stage.ingress.messages == []
        stage.tower.inside.clear()
        answer_items = await stage.items(2, "image:cat:8x8")
        assert len(answer_items) == 1
        assert len(stage.tower.encoded) == 1


async def test_a_word_that_comes_before_anything_has_begun_is_heard() -> None:
    async with desk() as stage:
        stage.ask(1, "image:cat:8x8")
        stage.done(1)
        await stage.empty()
        assert stage.ingress.messages == []
        assert stage.loads.loaded == []


async def test_a_bad_reference_fails_its_own_ask_and_no_other() -> None:
    async with desk() as stage:
        stage.ask(1, "slow:image:cat:8x8")
        failed = await stage.failure(2, "image:dog:8x8", "slow:rows:x:3", "bad")
        assert (failed.code, failed.message) == ("invalid_image", "this is no image")
        assert failed.param == "messages[0].content[2].image_url.url"
        stage.loads.gate.set()
        assert len(flat(await stage.ingress.answer(1))) == 1
        stage.done(1)
        await stage.empty()
        assert stage.meters.stats(stage.store).failures == [("encode", "invalid_image", 1)]


async def test_what_the_model_cannot_take_names_the_field() -> None:
    async with desk() as stage:
        small = await stage.failure(1, "image:cat:2x2")
        assert (small.code, small.param) == ("invalid_image", reference("").param)
        odd = await stage.failure(2, "rows:x:13")
        assert (odd.code, odd.param) == ("invalid_image", reference("").param)
        assert odd.message == f"{odd.param}: no image has 13 tokens"
        await stage.empty()
        assert stage.store.num_entries == 0


async def test_an_error_inside_tells_the_client_nothing_of_the_files() -> None:
    async with desk() as stage:
        failed = await stage.failure(1, "broken")
        assert failed.code == "engine_error"
        assert "secret" not in failed.message
        assert "Permission" not in failed.message


async def test_a_tower_that_fails_costs_one_request() -> None:
    async with desk() as stage:
        stage.tower.error = RuntimeError("out of memory at /dev/tower")
        failed = await stage.failure(1, "image:cat:8x8")
        assert failed.code == "engine_error"
        assert "/dev/tower" not in failed.message
        stage.tower.error = None
        assert len(await stage.items(2, "image:cat:8x8")) == 1


async def test_more_images_than_allowed_are_refused_by_name() -> None:
    async with desk(max_items=4) as stage:
        five = await stage.failure(1, *[f"image:{n}:4x4" for n in range(5)])
        assert five.param == reference("", 4).param
        assert "4 images at most" in five.message
        assert stage.loads.loaded == []
        stacked = await stage.failure(2, "rows:stack:1x5")
        assert "4 images at most" in stacked.message
        await stage.empty()


async def test_embeddings_of_another_model_are_refused() -> None:
    async with desk() as stage:
        failed = await stage.failure(1, "rows:dog:4:deadbeef")
        assert failed.code == "invalid_image"
        assert "trtllm-launch embed" in failed.message
        assert len(await stage.items(2, f"rows:dog:4:{MADE_BY.hex()}")) == 1
        stage.done(2)
        await stage.empty()


async def test_a_worker_without_a_tower_takes_embeddings_and_refuses_images() -> None:
    async with desk(sees=False) as stage:
        assert len(await stage.items(1, "rows:dog:4")) == 1
        failed = await stage.failure(2, "image:cat:8x8")
        assert "no images" in failed.message
        assert failed.param == reference("").param


async def test_a_worker_that_takes_images_only_refuses_embeddings() -> None:
    async with desk(vision={"embeddings": False}) as stage:
        failed = await stage.failure(1, "rows:dog:4")
        assert "no files of precomputed embeddings" in failed.message
        await stage.empty()
        assert stage.store.num_free_blocks == 64


async def test_an_engine_that_takes_images_itself_gets_their_pixels() -> None:
    async with desk(kind=MediaKind.IMAGE) as stage:
        (cat,) = await stage.items(1, "image:cat:8x12")
        assert (cat.kind, cat.size, cat.num_bytes) == (MediaKind.IMAGE, (8, 12), 8 * 12 * 3)
        assert stage.content(cat) == pattern(b"cat", 8 * 12 * 3)
        assert stage.tower.encoded == []


async def test_other_weights_make_other_items() -> None:
    async with desk() as stage:
        (before,) = await stage.items(1, "image:cat:8x8")
        stage.tower.fingerprint = b"tower-two-------"
        (after,) = await stage.items(2, "image:cat:8x8")
        assert before.digest != after.digest


async def test_the_tower_gives_way_to_the_rest_of_the_process() -> None:
    async with desk() as stage:
        await stage.items(1, "image:cat:8x8")
        assert stage.tower.niceness == {NICENESS}
        assert stage.meters.encode_seconds > 0


async def test_a_deadline_is_kept() -> None:
    async with desk() as stage:
        failed = await stage.failure(1, "image:cat:8x8", "slow:image:dog:8x8", timeout_s=0.05)
        assert failed.code == "overloaded"
        await stage.empty()


async def test_a_full_line_refuses_and_room_comes_back() -> None:
    async with desk(max_asks=2) as stage:
        stage.ask(1, "slow:image:cat:8x8")
        stage.ask(2, "slow:image:dog:8x8")
        failed = await stage.failure(3, "image:owl:8x8")
        assert failed.code == "overloaded"
        stage.loads.gate.set()
        await stage.ingress.answer(1)
        await stage.ingress.answer(2)
        assert len(await stage.items(4, "image:owl:8x8")) == 1  # answered ones do not count


async def test_a_store_that_is_full_of_what_is_in_use_refuses() -> None:
    async with desk(num_blocks=4) as stage:
        await stage.items(1, "rows:dog:16")
        failed = await stage.failure(2, "image:cat:4x4")
        assert failed.code == "overloaded"
        stage.done(1)
        await stage.empty()
        assert len(await stage.items(3, "image:cat:4x4")) == 1


async def test_a_lost_ingress_claims_nothing() -> None:
    async with desk() as stage:
        other = Inbox(Address("127.0.0.1", 3, "ingress-2", "1"))
        await stage.items(1, "rows:dog:4")
        stage.ask(1, "rows:dog:4", of=other)  # numbers are each ingress's own
        await other.answer(1)
        stage.ask(2, "slow:image:cat:8x8")
        await until(lambda: stage.loads.waiting == 1)
        stage.desk.peer_lost(stage.ingress)
        await until(lambda: stage.desk.num_open == 1)
        assert stage.store.num_pinned == 1
        stage.desk.peer_lost(other)
        await stage.empty()


async def test_items_that_an_ingress_has_forgotten_go_in_the_end() -> None:
    async with desk(hold_s=0.02) as stage:
        stage.ask(1, "rows:dog:4", timeout_s=0.5)
        await stage.ingress.answer(1)
        assert stage.store.num_pinned == 1
        await stage.empty()


async def test_a_draining_worker_finishes_what_it_has_and_takes_no_more() -> None:
    async with desk() as stage:
        stage.ask(1, "slow:image:cat:8x8")
        stage.desk.drain("it was told to stop")
        assert (await stage.failure(2, "rows:dog:4")).code == "unavailable"
        stage.loads.gate.set()
        assert len(flat(await stage.ingress.answer(1))) == 1
        assert stage.desk.num_open == 1
        stage.done(1)
        await stage.empty()


async def test_what_is_given_up_at_the_end_is_told() -> None:
    async with desk() as stage:
        stage.ask(1, "slow:image:cat:8x8")
        await stage.items(2, "rows:dog:4")
        stage.desk.abort_all()
        answer = await stage.ingress.answer(1)
        assert isinstance(answer, EncodeFailed)
        assert answer.code == "unavailable"
        await stage.empty()


async def test_closing_waits_for_the_image_in_the_tower() -> None:
    async with desk() as stage:
        stage.tower.gate.clear()
        stage.ask(1, "image:cat:8x8", "image:dog:8x8")
        await until(stage.tower.inside.is_set)
        closing = asyncio.create_task(stage.desk.close())
        answer = await stage.ingress.answer(1)
        assert isinstance(answer, EncodeFailed)
        assert not closing.done()
        stage.tower.gate.set()
        async with asyncio.timeout(FAR_S):
            await closing
        assert stage.store.num_claimed_blocks == 0
        assert stage.store.num_pinned == 0


@pytest.mark.parametrize("number", range(8))
async def test_a_storm_of_asks_and_leaves_holds_nothing_in_the_end(number: int) -> None:
    async with desk(num_blocks=24, max_items=16) as stage:
        urls = ["image:a:8x8", "image:b:8x8", "rows:c:4", "rows:d:3x2", "bad", "image:e:2x2"]
        for turn in range(40):
            picked = [urls[(turn * 7 + number * 3 + at) % len(urls)] for at in range(1 + turn % 3)]
            stage.ask(turn, *picked)
            if turn % 3 == number % 3:
                for _ in range(turn % 5):
                    await asyncio.sleep(0)
                stage.done(turn)
        for turn in range(40):
            stage.done(turn)
        await stage.empty()

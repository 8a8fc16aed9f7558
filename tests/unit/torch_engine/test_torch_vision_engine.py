"""Images through the engine: what is held for how long, what is refused, and the engine that only encodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.unit.torch_engine.driver import prompt_of, request_of
from tests.unit.torch_engine.images import FAMILIES, encode, image_of, place
from tests.unit.torch_engine.test_torch_engine_handoff import Told
from trtllm_workers.config.keys import default_config
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.base import Engine, EngineOptions, generate
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.torch.scheduler import Scheduler
from trtllm_workers.engines.torch.settings import KEYS
from trtllm_workers.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    MediaRejected,
    NotSupported,
    RequestError,
    StartError,
)
from trtllm_workers.transfer.media_store import MediaStore
from trtllm_workers.types import FinishReason, GenerateRequest, KvEventKind, MediaItem

Folder = Callable[[str], Path]
TALL = image_of(1, 90, 40)


def build(folder: Path, **options: Any) -> Engine:
    settings = {"kv_cache_config__tokens_per_block": 16, "kv_cache_config__max_tokens": 1024}
    config = default_config("torch", KEYS, **settings)
    return build_engine("torch", EngineOptions(folder, config, **options))


@pytest.fixture(params=["llava", "qwen2_5_vl"])
async def engine(request: pytest.FixtureRequest, vision_model: Folder) -> AsyncIterator[Engine]:
    built = build(vision_model(request.param))
    await built.start()
    yield built
    await built.close()


def store_of(engine: Engine) -> MediaStore:
    assert engine.media_store is not None
    return engine.media_store


def see(engine: Engine, seed: int = 1) -> MediaItem:
    """Put an image into the engine's store; nobody pins it."""
    store = store_of(engine)
    assert engine.encoder is not None
    item = encode(engine.encoder, store, image_of(seed, 90, 40))
    entry = store.pin(item.digest)
    assert entry is not None
    store.unpin(entry)
    store.unpin(entry)
    return item


def token_of(engine: Engine) -> int:
    assert engine.encoder is not None
    model: Any = engine.encoder
    return int(model._model.image_token_id)


def request_with(engine: Engine, *items: MediaItem, max_tokens: int = 8) -> GenerateRequest:
    parts: list[Any] = [prompt_of(0, 5)]
    for item in items:
        parts += [item, prompt_of(1, 4)]
    prompt, media = place(parts, token_of(engine))
    return request_of(prompt, max_tokens, media=media)


async def test_images_are_held_until_the_stream_ends(engine: Engine) -> None:
    item = see(engine)
    told = Told()
    engine.submit(request_with(engine, item, item), told)
    assert store_of(engine).num_pinned == 1
    chunks = await told.rest()
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert store_of(engine).num_pinned == 0


async def test_an_abort_lets_go_of_images(engine: Engine) -> None:
    told = Told()
    request = request_with(engine, see(engine), max_tokens=400)
    engine.submit(request, told)
    await told.number(0)
    engine.abort(request.request_id)
    assert (await told.rest())[-1].finish_reason is FinishReason.ABORT
    assert store_of(engine).num_pinned == 0


async def test_a_request_whose_images_are_not_here_is_an_error_and_holds_none(
    engine: Engine,
) -> None:
    here = see(engine)
    gone = msgspec.structs.replace(here, digest=bytes(16))
    with pytest.raises(EngineError, match="image 1 are not here"):
        engine.submit(request_with(engine, here, gone), Told())
    assert store_of(engine).num_pinned == 0
    told = Told()
    engine.submit(request_with(engine, here), told)
    assert (await told.rest())[-1].finish_reason is FinishReason.LENGTH


async def test_bytes_of_another_length_are_an_error(engine: Engine) -> None:
    store = store_of(engine)
    real = see(engine)
    item = msgspec.structs.replace(real, digest=bytes(16), num_bytes=real.num_bytes - 4)
    entry = store.commit(store.claim(item.num_bytes), item)
    store.unpin(entry)
    with pytest.raises(EngineError, match="image 0 is held as"):
        engine.submit(request_with(engine, item), Told())
    assert store.num_pinned == 0


async def test_a_prefill_holds_images_until_it_is_released_and_a_reservation_none(
    engine: Engine,
) -> None:
    store = store_of(engine)
    request = request_with(engine, see(engine))
    told, reserving, again = Told(), Told(), Told()
    engine.prefill(request, told)
    await told.number(0)
    assert store.num_pinned == 1
    engine.release(request.request_id)
    assert store.num_pinned == 0
    engine.reserve(request, reserving)
    await reserving.number(0)
    assert store.num_pinned == 0
    engine.resume(request.request_id, None, again)
    assert store.num_pinned == 1
    assert (await again.rest())[-1].finish_reason is FinishReason.LENGTH
    assert store.num_pinned == 0


async def test_a_reservation_needs_its_images_only_to_compute_them(engine: Engine) -> None:
    item = see(engine)
    gone = msgspec.structs.replace(item, digest=bytes(16))
    request, reserving = request_with(engine, gone), Told()
    engine.reserve(request, reserving)
    await reserving.number(0)
    with pytest.raises(EngineError, match="are not here"):
        engine.resume(request.request_id, None, Told())
    with pytest.raises(EngineError, match="are not here"):
        engine.prefill_reserved(request.request_id, 0, Told())
    assert await engine.holdings() != {}  # still reserved
    engine.abort(request.request_id)
    assert await engine.holdings() == {}


async def test_the_end_of_the_engine_lets_go_of_images(engine: Engine) -> None:
    store, told = store_of(engine), Told()
    engine.submit(request_with(engine, see(engine), max_tokens=400), told)
    await told.number(0)
    await engine.close()
    assert (await told.rest())[-1].finish_reason is FinishReason.ABORT
    assert store.num_pinned == 0
    assert engine.media_store is None
    assert engine.encoder is None


async def test_the_death_of_the_engine_lets_go_of_images(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: object) -> None:
        raise RuntimeError("a step failed")

    monkeypatch.setattr(Scheduler, "plan", broken)
    told = Told()
    engine.submit(request_with(engine, see(engine)), told)
    assert (await told.rest())[-1].error_code == EngineDead.code
    assert store_of(engine).num_pinned == 0


async def test_placeholders_without_an_image_are_refused(engine: Engine) -> None:
    prompt = [*prompt_of(0, 5), token_of(engine), *prompt_of(1, 5)]
    with pytest.raises(RequestError, match="stand for no image") as caught:
        engine.submit(request_of(prompt), Told())
    assert caught.value.param == "prompt_token_ids"


async def test_a_grid_of_another_number_of_places_is_refused(vision_model: Folder) -> None:
    engine = build(vision_model("qwen2_vl"))
    await engine.start()
    try:
        item = see(engine)
        wrong = msgspec.structs.replace(item, grid=(1, item.num_tokens, 2))
        with pytest.raises(RequestError, match=r"but a grid of \[1, "):
            engine.submit(request_with(engine, wrong), Told())
    finally:
        await engine.close()


async def test_a_model_of_text_refuses_images(model_folder: Folder, vision_model: Folder) -> None:
    engine = build(model_folder("llama"))
    info = await engine.start()
    try:
        assert info.vision is None
        assert engine.media_store is None
        assert engine.encoder is None
        item = MediaItem(bytes(16), 0, 4)
        with pytest.raises(NotSupported, match="takes text only"):
            engine.submit(request_of(prompt_of(0, 8), media=[item]), Told())
    finally:
        await engine.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_an_engine_that_does_not_encode_takes_what_others_encoded(
    family: str, vision_model: Folder
) -> None:
    whole, half = build(vision_model(family)), build(vision_model(family), encodes=False)
    infos = [await engine.start() for engine in (whole, half)]
    try:
        assert [info.vision.encodes for info in infos if info.vision] == [True, False]
        assert infos[0].model_id == infos[1].model_id
        assert half.encoder is None
        item = see(whole)
        request = request_with(whole, item)
        source, target = store_of(whole), store_of(half)
        entry = source.pin(item.digest)
        assert entry is not None
        claim = target.claim(item.num_bytes)
        for theirs, ours in zip(source.bytes_of(entry), claim.runs, strict=True):
            ours[:] = theirs
        target.commit(claim, item)
        answers = [
            [token async for chunk in generate(engine, request) for token in chunk.token_ids]
            for engine in (whole, half)
        ]
        assert answers[0] == answers[1]
    finally:
        await whole.close()
        await half.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_an_engine_that_only_encodes_makes_the_same_items(
    family: str, vision_model: Folder
) -> None:
    whole = build(vision_model(family))
    eyes = build(vision_model(family), generates=False, media=MediaSettings(cache_bytes=1 << 20))
    infos = [await engine.start() for engine in (whole, eyes)]
    try:
        assert infos[0].vision == infos[1].vision
        assert infos[0].model_id == infos[1].model_id
        assert (infos[1].num_blocks, infos[1].layout) == (0, None)
        assert store_of(eyes).pool.num_blocks == 16
        assert see(eyes) == see(whole)
        made = []
        for engine in (whole, eyes):
            entry = store_of(engine).pin(see(engine).digest)
            assert entry is not None
            made.append(b"".join(store_of(engine).bytes_of(entry)))
        assert made[0] == made[1]
        for ask in (eyes.submit, eyes.prefill, eyes.reserve):
            with pytest.raises(NotSupported, match="only encodes images"):
                ask(request_of(prompt_of(0, 4)), Told())
        eyes.abort("unknown")
        eyes.release("unknown")
        assert eyes.kv_pool is None
        assert eyes.stats().total_blocks == 0
        assert await eyes.holdings() == {}
        dying = asyncio.create_task(eyes.died())
        await asyncio.wait([dying], timeout=0)
        assert not dying.done()
        dying.cancel()
    finally:
        await whole.close()
        await eyes.close()
        await eyes.close()
    kinds = [event.kind async for event in eyes.kv_events()]
    assert kinds == [KvEventKind.CLEARED]
    with pytest.raises(EngineDead):
        eyes.submit(request_of(prompt_of(0, 4)), Told())


@pytest.mark.parametrize("family", FAMILIES)
async def test_rows_do_not_depend_on_the_threads_of_whoever_encodes(
    family: str, vision_model: Folder
) -> None:
    engine = build(vision_model(family), generates=False)
    await engine.start()
    try:
        encoder = engine.encoder
        assert encoder is not None
        image = image_of(1, 60, 60)
        num_bytes = encoder.plan(60, 60).num_bytes
        made: list[bytes] = []

        def run(num_threads: int) -> None:
            torch.set_num_threads(num_threads)
            into = bytearray(num_bytes)
            encoder.encode(memoryview(image.tobytes()), 60, 60, [memoryview(into)])
            made.append(bytes(into))

        torch.set_num_threads(2)
        for num_threads in (1, 2, 3):
            await asyncio.to_thread(run, num_threads)
        assert len(set(made)) == 1
        assert torch.get_num_threads() == 2  # here, where an engine may compute
    finally:
        await engine.close()


async def test_there_is_nothing_to_encode_for_a_model_of_text(
    model_folder: Folder, vision_model: Folder
) -> None:
    blind = build(model_folder("llama"), generates=False)
    with pytest.raises(ConfigError, match="takes text only"):
        await blind.start()
    await blind.close()
    idle = build(vision_model("llava"), generates=False, encodes=False)
    with pytest.raises(StartError, match="nothing to do"):
        await idle.start()
    await idle.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_grids_of_embeddings_are_checked(family: str, vision_model: Folder) -> None:
    engine = build(vision_model(family), generates=False)
    await engine.start()
    try:
        encoder = engine.encoder
        assert encoder is not None
        if family == "llava":
            assert encoder.check_grid(16, None) is None
            for num_tokens, grid in ((15, None), (17, None), (16, (1, 4, 4))):
                with pytest.raises(MediaRejected):
                    encoder.check_grid(num_tokens, grid)
            with pytest.raises(MediaRejected, match="too long"):
                encoder.plan(1, 201)
        else:
            assert encoder.check_grid(6, (1, 4, 6)) == (1, 2, 3)
            with pytest.raises(MediaRejected, match="trtllm-launch embed"):
                encoder.check_grid(6, None)
            for bad in ((1, 4, 4), (1, 3, 8), (2, 4, 6), (1, 0, 6), (-1, -4, 6)):
                with pytest.raises(MediaRejected):
                    encoder.check_grid(6, bad)
    finally:
        await engine.close()

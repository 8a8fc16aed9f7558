"""Images in the simulator: real bytes of real sizes, and answers that depend on what they are."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trtllm_workers.config.keys import default_config
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.config.vision_model import read_vision
from trtllm_workers.engines.base import EngineOptions, generate
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.sim.cost import CostModel
from trtllm_workers.engines.sim.engine import SimEngine
from trtllm_workers.engines.sim.images import SimEncoder
from trtllm_workers.engines.sim.settings import KEYS
from trtllm_workers.errors import EngineError, MediaRejected, NotSupported, RequestError
from trtllm_workers.types import (
    FinishReason,
    GenerateRequest,
    MediaItem,
    Prefilled,
    Reservation,
    SamplingParams,
    TokenChunk,
)

PAD, BLOCK = 900, 8
CONFIG = {
    "model_type": "qwen2_vl",
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "hidden_size": 96,
    "torch_dtype": "bfloat16",
    "image_token_id": PAD,
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
}
FREE = {"decode": {"base_ms": 0}}
RED, BLUE = bytes([255, 0, 0]), bytes([0, 0, 255])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@asynccontextmanager
async def running(model: Path, **options: Any) -> AsyncIterator[SimEngine]:
    cost = model.parent / "cost.yaml"
    cost.write_text(json.dumps(FREE))
    config = default_config("sim", KEYS, kv_cache_config__tokens_per_block=BLOCK)
    made = EngineOptions(model, config, extra={"cost_path": str(cost)}, **options)
    engine = build_engine("sim", made)
    assert isinstance(engine, SimEngine)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def keep(engine: SimEngine, name: bytes, color: bytes = RED, side: int = 56) -> MediaItem:
    """Encode a picture and keep it, as a worker does."""
    encoder, store = engine.encoder, engine.media_store
    assert encoder is not None
    assert store is not None
    plan = encoder.plan(side, side)
    claim = store.claim(plan.num_bytes)
    encoder.encode(memoryview(color * side * side), side, side, claim.runs)
    item = MediaItem(
        name * 16, 0, plan.num_tokens, plan.grid, kind=plan.kind, num_bytes=plan.num_bytes
    )
    store.unpin(store.commit(claim, item))
    return item


def asked(name: str, *items: MediaItem, max_tokens: int = 12, **more: Any) -> GenerateRequest:
    """Return a request for a prompt of 20 words, then the images with a word after each."""
    tokens, media = list(range(300, 320)), []
    for item in items:
        media.append(msgspec.structs.replace(item, offset=len(tokens)))
        tokens += [PAD] * item.num_tokens + [400]
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        media=tuple(media),
        **more,
    )


async def answer(engine: SimEngine, request: GenerateRequest) -> tuple[list[int], int]:
    chunks = [chunk async for chunk in generate(engine, request)]
    return [token for chunk in chunks for token in chunk.token_ids], chunks[0].cached_tokens


async def test_answers_depend_on_what_images_show_and_share_no_block_from_there_on(
    model: Path,
) -> None:
    async with running(model) as engine:
        red, blue = keep(engine, b"r"), keep(engine, b"b", BLUE)
        first, cached = await answer(engine, asked("1", red))
        assert cached == 0
        again, cached = await answer(engine, asked("2", red))
        assert (again, cached) == (first, 24)
        other, cached = await answer(engine, asked("3", blue))
        assert other != first
        assert cached == 16  # the two blocks before the image
        both, _ = await answer(engine, asked("4", red, blue))
        swapped, _ = await answer(engine, asked("5", blue, red))
        assert both != swapped
        assert engine.media_store is not None
        assert engine.media_store.num_pinned == 0


async def test_bytes_that_are_not_here_are_an_error_and_pins_last_as_long_as_requests(
    model: Path,
) -> None:
    async with running(model) as engine:
        store = engine.media_store
        assert store is not None
        gone = msgspec.structs.replace(keep(engine, b"r"), digest=b"x" * 16)
        with pytest.raises(EngineError, match="the bytes of image 0 are not here"):
            engine.submit(asked("1", gone), lambda _chunk: None)
        red = keep(engine, b"r")
        ended: asyncio.Queue[TokenChunk] = asyncio.Queue()
        engine.submit(asked("2", red, max_tokens=2000), ended.put_nowait)
        await ended.get()
        assert store.num_pinned == 1
        engine.abort("2")
        while (await ended.get()).finish_reason is not FinishReason.ABORT:
            pass
        assert store.num_pinned == 0
        engine.submit(asked("3", red, max_tokens=2000), ended.put_nowait)
    assert store.num_pinned == 0  # the end of the engine ends requests too


@pytest.mark.parametrize("brought", [True, False])
async def test_a_prompt_with_images_goes_on_elsewhere(model: Path, brought: bool) -> None:
    async with running(model) as prefill, running(model) as decode:
        red = keep(prefill, b"r")
        expected, _ = await answer(prefill, asked("whole", red))
        loop = asyncio.get_running_loop()
        made: asyncio.Future[Prefilled] = loop.create_future()
        held: asyncio.Future[Reservation] = loop.create_future()
        prefill.prefill(asked("r", red), made.set_result)
        decode.reserve(asked("r", red), held.set_result)  # nothing of the image is there, or needed
        prefilled, reservation = await made, await held
        assert prefill.media_store is not None
        assert prefill.media_store.num_pinned == 1
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()
        if brought:
            source, target = prefill.kv_pool, decode.kv_pool
            assert source is not None
            assert target is not None
            for ours, theirs in zip(reservation.block_ids, prefilled.block_ids, strict=True):
                target.block(ours)[:] = source.block(theirs)
            decode.resume("r", prefilled.first, chunks.put_nowait)
        else:
            with pytest.raises(EngineError, match="the bytes of image 0 are not here"):
                decode.resume("r", None, chunks.put_nowait)
            keep(decode, b"r")
            decode.resume("r", None, chunks.put_nowait)
        tokens: list[int] = []
        while True:
            chunk = await chunks.get()
            tokens += chunk.token_ids
            if chunk.finish_reason is not None:
                break
        assert tokens == expected
        assert decode.num_wrong_blocks == 0
        prefill.release("r")
        for engine in (prefill, decode):
            assert engine.media_store is not None
            assert engine.media_store.num_pinned == 0


async def test_kv_of_another_image_is_found_out(model: Path) -> None:
    async with running(model) as prefill, running(model) as decode:
        red, blue = keep(prefill, b"r"), keep(prefill, b"b", BLUE)
        loop = asyncio.get_running_loop()
        made: asyncio.Future[Prefilled] = loop.create_future()
        held: asyncio.Future[Reservation] = loop.create_future()
        prefill.prefill(asked("r", red), made.set_result)
        decode.reserve(asked("r", blue), held.set_result)
        prefilled, reservation = await made, await held
        source, target = prefill.kv_pool, decode.kv_pool
        assert source is not None
        assert target is not None
        for ours, theirs in zip(reservation.block_ids, prefilled.block_ids, strict=True):
            target.block(ours)[:] = source.block(theirs)
        decode.resume("r", prefilled.first, lambda _chunk: None)
        assert decode.num_wrong_blocks == len(prefilled.block_ids) - 2


async def test_placeholders_and_images_must_be_each_other_s(model: Path) -> None:
    async with running(model) as engine:
        red = keep(engine, b"r")
        alone = msgspec.structs.replace(asked("1", red), media=())
        with pytest.raises(RequestError, match="stand for no image"):
            engine.submit(alone, lambda _chunk: None)
        flat = msgspec.structs.replace(red, grid=None)
        with pytest.raises(RequestError, match="has no grid"):
            engine.submit(asked("2", flat), lambda _chunk: None)


async def test_a_text_model_takes_no_images(model: Path) -> None:
    async with running(model) as engine:
        item = keep(engine, b"r")
    (model / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen2"}))
    async with running(model) as engine:
        assert (engine.media_store, engine.encoder) == (None, None)
        with pytest.raises(NotSupported, match="takes text only"):
            engine.submit(asked("1", item), lambda _chunk: None)


async def test_a_worker_that_encodes_generates_nothing(model: Path) -> None:
    async with running(model, generates=False) as engine:
        assert keep(engine, b"r").num_tokens == 4
        with pytest.raises(NotSupported, match="encodes images and generates nothing"):
            engine.submit(asked("1"), lambda _chunk: None)


async def test_a_worker_without_a_tower_takes_what_others_made(model: Path) -> None:
    async with running(model, encodes=False) as engine:
        assert engine.encoder is None
        store = engine.media_store
        assert store is not None
        item = MediaItem(b"r" * 16, 0, 4, (1, 2, 2), num_bytes=4 * 192)
        claim = store.claim(item.num_bytes)
        store.unpin(store.commit(claim, item))
        tokens, _ = await answer(engine, asked("1", item))
        assert len(tokens) == 12


async def test_the_store_is_as_large_as_the_operator_says(model: Path) -> None:
    async with running(model, media=MediaSettings(cache_bytes=1 << 20)) as engine:
        assert engine.media_store is not None
        assert engine.media_store.num_free_blocks * engine.media_store.block_bytes == 1 << 20


def encoder_of(model: Path, sleep: Callable[[float], None], **cost: Any) -> SimEncoder:
    found = read_vision(model)
    assert found is not None
    costs = CostModel(**{"encode_ms_per_image": 0.0, "encode_us_per_token": 0.0, **cost})
    return SimEncoder(found, found.info(found.dtype, encodes=True), "m", costs, sleep)


def rows(encoder: SimEncoder, color: bytes, side: int = 56, *cuts: int) -> bytes:
    size = encoder.plan(side, side).num_bytes
    whole = bytearray(size)
    edges = [0, *cuts, size]
    pieces = [memoryview(whole)[first:end] for first, end in itertools.pairwise(edges)]
    encoder.encode(memoryview(color * side * side), side, side, pieces)
    return bytes(whole)


def test_equal_pixels_give_equal_bytes_however_they_are_laid_out(model: Path) -> None:
    encoder = encoder_of(model, lambda _seconds: None)
    whole = rows(encoder, RED, 560)
    assert len(whole) == 400 * 192
    assert rows(encoder, RED, 560, 1, 16382, 16383, 50000) == whole
    assert rows(encoder, BLUE, 560) != whole
    assert len({whole[at : at + 192] for at in range(0, len(whole), 192)}) == 400
    # As bfloat16 they are numbers.
    values = struct.unpack(f"<{len(whole) // 2}H", whole)
    floats = struct.unpack(
        f"<{len(values)}f", struct.pack(f"<{len(values)}I", *(v << 16 for v in values))
    )
    assert all(0.4 < value < 2 for value in floats)


def test_encoding_takes_what_the_cost_model_says_asleep(model: Path) -> None:
    slept: list[float] = []
    encoder = encoder_of(model, slept.append, encode_ms_per_image=50_000.0, encode_us_per_token=1e6)
    rows(encoder, RED)
    assert slept[0] == pytest.approx(54, abs=1)


def test_fingerprints_tell_models_apart(model: Path) -> None:
    encoder = encoder_of(model, lambda _seconds: None)
    found = read_vision(model)
    assert found is not None
    other = SimEncoder(found, found.info(found.dtype, encodes=True), "n", CostModel())
    assert other.fingerprint != encoder.fingerprint
    assert encoder.check_grid(4, (1, 2, 2)) == (1, 2, 2)
    with pytest.raises(MediaRejected, match="does not make 5"):
        encoder.check_grid(5, (1, 2, 2))

"""Images: what every engine that takes them guarantees, and what one that does not says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.contract.engines import KINDS, EngineKind
from tests.contract.harness import Answer, Harness, check_idle
from tests.fakes.seeing import PAD, asked, keep_image, make_seeing_model
from tests.fakes.stand_in import tensorrt_llm_stand_in
from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import EngineError, RequestError
from trtllm_workers.types import FinishReason, GenerateRequest, MediaItem, SamplingParams

SEEING = ("sim", "sim_small_pool", "torch_vision", "trtllm")
RED, BLUE = (255, 0, 0), (0, 0, 255)


BLIND = tuple(kind for kind in KINDS if kind.name != "torch_vision")


@pytest.fixture(scope="session")
def tower_less(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for engines that compute no tower."""
    return make_seeing_model(tmp_path_factory.mktemp("seeing") / "model")


@pytest.fixture(params=[kind for kind in KINDS if kind.name in SEEING], ids=lambda kind: kind.name)
def seeing_kind(request: pytest.FixtureRequest) -> EngineKind:
    kind: EngineKind = request.param
    return kind


@pytest.fixture
def seeing_folder(
    seeing_kind: EngineKind, tower_less: Path, vision_model: Callable[[str], Path]
) -> Path:
    return vision_model("qwen2_vl") if seeing_kind.engine == "torch" else tower_less


@pytest.fixture
async def seeing(
    seeing_kind: EngineKind, seeing_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Harness]:
    kind = seeing_kind
    made = Harness(replace(kind, write_checkpoint=_written), seeing_folder)
    with tensorrt_llm_stand_in() if kind.engine == "trtllm" else nullcontext():
        monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "1")
        yield made
        await made.close()


def _written(_path: Path, _eos: list[int]) -> None:
    """The folder is there."""


Ask = Callable[..., GenerateRequest]


@pytest.fixture
def ask(seeing_folder: Path) -> Ask:
    def made(name: str, *items: MediaItem, **more: Any) -> GenerateRequest:
        return asked(seeing_folder, name, *items, **more)

    return made


async def answer(engine: Engine, request: GenerateRequest) -> Answer:
    made = Answer(request)
    engine.submit(request, made.deliver)
    return await made.end()


async def test_answers_depend_on_what_images_show(seeing: Harness, ask: Ask) -> None:
    engine = await seeing.start()
    red, blue = keep_image(engine, b"r"), keep_image(engine, b"b", BLUE)
    first = await answer(engine, ask("1", red, blue))
    assert first.finish_reason is FinishReason.LENGTH
    assert (await answer(engine, ask("2", red, blue))).tokens == first.tokens
    assert (await answer(engine, ask("3", blue, red))).tokens != first.tokens
    assert (await answer(engine, ask("4", red, red))).tokens != first.tokens
    check_idle(engine)


async def test_other_images_share_no_block_from_the_first_image_on(
    seeing: Harness, ask: Ask
) -> None:
    engine = await seeing.start()
    red, blue = keep_image(engine, b"r"), keep_image(engine, b"b", BLUE)
    await answer(engine, ask("1", red))
    again = await answer(engine, ask("2", red))
    assert again.cached_tokens > 0
    request = ask("3", blue)
    other = await answer(engine, request)
    assert other.cached_tokens <= request.media[0].offset
    # Nor does a text whose tokens are the same up to there and beyond.
    assert (await answer(engine, ask("4"))).cached_tokens <= request.media[0].offset


async def test_images_whose_bytes_are_not_here_are_an_error(seeing: Harness, ask: Ask) -> None:
    engine = await seeing.start()
    red = keep_image(engine, b"r")
    gone = msgspec.structs.replace(red, digest=b"x" * 16)
    for begin in (engine.submit, engine.prefill):
        with pytest.raises(EngineError, match="not here"):
            begin(ask("1", red, gone), lambda _what: None)
    store = engine.media_store
    assert store is not None
    assert store.num_pinned == 0
    check_idle(engine)


async def test_bytes_stay_until_their_request_ends(seeing: Harness, ask: Ask) -> None:
    engine = await seeing.start()
    store = engine.media_store
    assert store is not None
    red = keep_image(engine, b"r")
    made = Answer(ask("1", red, max_tokens=100))
    engine.submit(made.request, made.deliver)
    await made.reaches(2)
    assert store.num_pinned == 1
    engine.abort("1")
    await made.end()
    assert store.num_pinned == 0
    await answer(engine, ask("2", red))
    assert store.num_pinned == 0


async def test_placeholders_and_images_must_be_each_other_s(seeing: Harness, ask: Ask) -> None:
    engine = await seeing.start()
    red = keep_image(engine, b"r")
    good = ask("1", red)
    pad = good.prompt_token_ids[good.media[0].offset]
    alone = msgspec.structs.replace(good, media=())
    beside = msgspec.structs.replace(good, prompt_token_ids=[pad, *good.prompt_token_ids])
    moved = msgspec.structs.replace(good.media[0], offset=good.media[0].offset - 1)
    early = msgspec.structs.replace(good, media=(moved,))
    for request in (alone, beside, early):
        for begin in (engine.submit, engine.prefill, engine.reserve):
            with pytest.raises(RequestError) as caught:
                begin(request, lambda _what: None)
            assert caught.value.param in ("media", "prompt_token_ids")
    check_idle(engine)


async def test_encoding_gives_what_was_planned_and_the_same_each_time(seeing: Harness) -> None:
    engine = await seeing.start()
    encoder = engine.encoder
    assert encoder is not None
    for height, width in [(1, 1), (30, 50), (57, 28)]:
        plan = encoder.plan(height, width)
        made = []
        for color in (RED, RED, BLUE):
            whole = bytearray(plan.num_bytes)
            half = plan.num_bytes // 2
            pieces = [memoryview(whole)[:half], memoryview(whole)[half:]]
            pixels = memoryview(bytes(color) * (height * width))
            await asyncio.to_thread(encoder.encode, pixels, height, width, pieces)
            made.append(bytes(whole))
        assert made[0] == made[1] != made[2]
    assert len(encoder.fingerprint) == 16


@pytest.mark.parametrize("engine_kind", BLIND, ids=lambda kind: kind.name)
async def test_an_engine_of_a_text_model_takes_no_images(harness: Harness) -> None:
    engine, info = await harness.start_with_info()
    assert (info.vision, engine.media_store, engine.encoder) == (None, None, None)
    item = MediaItem(b"r" * 16, 1, 2)
    request = GenerateRequest(
        request_id="1",
        prompt_token_ids=[5, PAD, PAD, 6],
        sampling=SamplingParams(max_tokens=4),
        media=(item,),
        prompt_text="<image>",
    )
    for begin in (engine.submit, engine.prefill, engine.reserve):
        with pytest.raises(RequestError, match="text only") as caught:
            begin(request, lambda _what: None)
        assert caught.value.param == "media"

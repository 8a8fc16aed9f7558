"""Images and embeddings on the adapter: TensorRT-LLM sees all of them, or the request is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.fakes.seeing import (
    HIDDEN,
    PAD,
    PLACEHOLDER,
    asked,
    keep_image,
    keep_rows,
    make_seeing_model,
    tokenizer_of,
)
from tests.fakes.stand_in import tensorrt_llm_stand_in
from tests.unit.trtllm_engine.image_stage import rows_of, seen_by, started, tokens_of
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.trtllm.media_prompts import MediaPrompts
from trtllm_workers.errors import (
    EngineError,
    MediaRejected,
    NotSupported,
    RequestError,
)
from trtllm_workers.types import (
    KvEventKind,
    MediaItem,
    MediaKind,
    TokenChunk,
)

BLUE = (0, 0, 255)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeing_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "1")
    monkeypatch.setenv("FAKE_TRTLLM_TRANSPORT", "tcp")
    with tensorrt_llm_stand_in():
        yield


# --- what TensorRT-LLM is given ----------------------------------------------------------------


async def test_embeddings_go_with_the_prompt_s_text_and_nothing_else_does(model: Path) -> None:
    async with started(model) as engine:
        first, second = rows_of(1), rows_of(2, 3)
        items = keep_rows(engine, b"a", first), keep_rows(engine, b"b", second)
        request = asked(model, "1", *items)
        tokens = await tokens_of(engine, request)
        inputs = seen_by(engine)["inputs"]
        assert set(inputs) == {"prompt", "multi_modal_embeddings"}
        # Its tokenizer puts <s> before the text once more.
        assert inputs["prompt"] == request.prompt_text.removeprefix("<s>")
        assert "[system] be brief; [user] look: <image> and <image>" in inputs["prompt"]
        given = inputs["multi_modal_embeddings"]
        assert set(given) == {"image"}
        assert [
            torch.equal(a, b) for a, b in zip(given["image"], (first, second), strict=True)
        ] == [
            True,
            True,
        ]
        # What it makes of the text is as long as was counted.
        assert len(seen_by(engine)["prompt"]) == len(request.prompt_token_ids)
        swapped = asked(model, "2", items[1], items[0])
        assert await tokens_of(engine, swapped) != tokens
        assert await tokens_of(engine, msgspec.structs.replace(request, request_id="3")) == tokens


async def test_images_go_as_pictures_with_the_prompt_s_text(model: Path) -> None:
    async with started(model) as engine:
        red, blue = keep_image(engine, b"r"), keep_image(engine, b"b", BLUE)
        assert (red.kind, red.num_bytes) == (MediaKind.IMAGE, 30 * 50 * 3)
        tokens = await tokens_of(engine, asked(model, "1", red))
        inputs = seen_by(engine)["inputs"]
        assert set(inputs) == {"prompt", "multi_modal_data"}
        (picture,) = inputs["multi_modal_data"]["image"]
        assert (picture.mode, picture.size, picture.getpixel((49, 29))) == (
            "RGB",
            (50, 30),
            (255, 0, 0),
        )
        assert len(seen_by(engine)["prompt"]) == len(asked(model, "x", red).prompt_token_ids)
        assert await tokens_of(engine, asked(model, "2", blue)) != tokens


async def test_the_loader_would_have_made_the_same_of_one_message(model: Path) -> None:
    from tensorrt_llm.inputs import default_multimodal_input_loader

    tokenizer, rows = tokenizer_of(model), [rows_of(1), rows_of(2, 3)]
    (expected,) = default_multimodal_input_loader(
        tokenizer=tokenizer,
        model_dir=str(model),
        model_type="llava_next",
        modality="multiple_image",
        prompts=["what is it?"],
        mm_embeddings=[rows],
    )
    async with started(model) as engine:
        items = [keep_rows(engine, bytes([65 + at]), one) for at, one in enumerate(rows)]
        request = asked(model, "1", *items)
        content = [*({"type": "image"} for _ in rows), {"type": "text", "text": "what is it?"}]
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        request = msgspec.structs.replace(request, prompt_text=rendered)
        kept = [engine.media_store.pin(item.digest) for item in items]
        prompts: MediaPrompts = engine._streams._prompts
        made = prompts.inputs(request, kept)
        # The one difference: a beginning that the tokenizer will put there by itself.
        assert made["prompt"] == expected["prompt"].removeprefix("<s>")
        assert set(made) == set(expected)
        for ours, theirs in zip(
            made["multi_modal_embeddings"]["image"],
            expected["multi_modal_embeddings"]["image"],
            strict=True,
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda request, shown: request.prompt_token_ids,
        lambda request, shown: {"prompt_token_ids": request.prompt_token_ids, **shown},
        lambda request, shown: {"prompt": "x", "prompt_token_ids": [1], **shown},
        lambda request, shown: {"prompt": "x"},
        lambda request, shown: {"prompt": "", **shown},
        lambda request, shown: {"prompt": "x", "multi_modal_embeddings": {"image": []}},
        lambda request, shown: {"prompt": "x", "multi_modal_embeddings": {"video": [1]}},
    ],
)
async def test_nothing_passes_that_tensorrt_llm_would_not_see(
    model: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    async with started(model) as engine:
        item = keep_rows(engine, b"a", rows_of(1))
        shown = {"multi_modal_embeddings": {"image": [rows_of(1)]}}
        monkeypatch.setattr(
            MediaPrompts, "inputs", lambda _self, request, _pinned: wrong(request, shown)
        )
        num_seen = len(engine._llm.fake.seen)
        with pytest.raises(EngineError, match="would not see all of its images"):
            engine.submit(asked(model, "1", item), lambda _chunk: None)
        assert len(engine._llm.fake.seen) == num_seen
        assert engine.media_store.num_pinned == 0


async def test_bytes_in_several_pieces_are_put_together(model: Path) -> None:
    async with started(model, media=MediaSettings(cache_bytes=4 << 16)) as engine:
        store = engine.media_store
        for claim in [store.claim(store.block_bytes) for _ in range(4)][::2]:
            store.drop(claim)
        rows = rows_of(1, 2 * store.block_bytes // (4 * HIDDEN))
        item = keep_rows(engine, b"a", rows)
        kept = store.pin(item.digest)
        assert len(store.bytes_of(kept)) == 2
        found = engine._streams._prompts._rows(kept, item.num_tokens)
        assert torch.equal(found, rows)


# --- what is refused -------------------------------------------------------------------------


async def test_images_and_embeddings_in_one_request_are_refused_by_name(model: Path) -> None:
    async with started(model) as engine:
        both = keep_rows(engine, b"a", rows_of(1)), keep_image(engine, b"r")
        with pytest.raises(NotSupported, match="not both in one request") as caught:
            engine.submit(asked(model, "1", *both), lambda _chunk: None)
        assert (caught.value.param, caught.value.http_status) == ("media", 400)


async def test_a_text_without_a_place_for_every_image_is_refused(model: Path) -> None:
    async with started(model) as engine:
        item = keep_rows(engine, b"a", rows_of(1))
        good = asked(model, "1", item)
        for text in ("", "[user] look: ", good.prompt_text + PLACEHOLDER):
            request = msgspec.structs.replace(good, prompt_text=text)
            with pytest.raises(RequestError, match="times for 1 images") as caught:
                engine.submit(request, lambda _chunk: None)
            assert caught.value.param == "media"


async def test_bytes_that_are_not_here_are_an_error(model: Path) -> None:
    async with started(model) as engine:
        item = MediaItem(b"x" * 16, 0, 5, num_bytes=5 * HIDDEN * 4)
        with pytest.raises(EngineError, match="the bytes of image 0 are not here"):
            engine.submit(asked(model, "1", item), lambda _chunk: None)
        short = msgspec.structs.replace(keep_rows(engine, b"a", rows_of(1)), num_tokens=4)
        with pytest.raises(EngineError, match=r"have 1280 bytes, where 1024 make 64 values"):
            engine.submit(asked(model, "2", short), lambda _chunk: None)
        assert engine.media_store.num_pinned == 0
        assert await tokens_of(engine, asked(model, "3"))


async def test_a_processor_that_attaches_no_embeddings_is_no_dead_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(model) as engine:
        monkeypatch.setattr("tensorrt_llm.inputs.eyes.ATTACHING", ())
        item = keep_rows(engine, b"a", rows_of(1))
        with pytest.raises(NotSupported, match="cannot take this model's images like this"):
            engine.submit(asked(model, "1", item), lambda _chunk: None)
        assert engine.media_store.num_pinned == 0
        assert await tokens_of(engine, asked(model, "2", keep_image(engine, b"r")))


@pytest.mark.parametrize("shown", ["images", "embeddings"])
async def test_an_input_processor_that_fails_is_no_dead_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    async with started(model) as engine:

        def fails(*_arguments: Any) -> None:
            raise AssertionError("all images should be consumed")

        monkeypatch.setattr("tensorrt_llm.inputs.eyes.Eyes._fuse", fails)
        image = keep_image(engine, b"r")
        item = image if shown == "images" else keep_rows(engine, b"a", rows_of(1))
        with pytest.raises(
            RequestError, match="cannot take these images: all images should"
        ) as caught:
            engine.submit(asked(model, "1", item), lambda _chunk: None)
        assert caught.value.param == "media"
        assert engine.media_store.num_pinned == 0
        assert await tokens_of(engine, asked(model, "2"))


@pytest.mark.parametrize("family", ["llava", "llama4"])
async def test_a_family_that_tensorrt_llm_cannot_show_images_takes_text_only(
    tmp_path: Path, family: str
) -> None:
    folder = make_seeing_model(tmp_path / "model", family)
    async with started(folder) as engine:
        assert (engine.media_store, engine.encoder) == (None, None)
        item = MediaItem(b"x" * 16, 0, 5)
        with pytest.raises(NotSupported, match="takes text only; send no images"):
            engine.submit(asked(folder, "1", item), lambda _chunk: None)
        assert await tokens_of(engine, asked(folder, "2"))


async def test_a_family_whose_images_cannot_be_counted_takes_embeddings(tmp_path: Path) -> None:
    folder = make_seeing_model(tmp_path / "model", "mistral3")
    async with started(folder) as engine:
        with pytest.raises(MediaRejected, match="family mistral3"):
            engine.encoder.plan(30, 50)
        assert not engine._info.vision.images
        assert await tokens_of(engine, asked(folder, "1", keep_rows(engine, b"a", rows_of(1))))


# --- what is shared --------------------------------------------------------------------------


async def test_what_is_shown_is_in_the_salt_and_no_event_claims_it_as_text(model: Path) -> None:
    async with started(model) as engine:
        first, second = keep_rows(engine, b"a", rows_of(1)), keep_rows(engine, b"b", rows_of(2))
        salts = []
        for number, (items, salt) in enumerate(
            [((first,), ""), ((second,), ""), ((first, second), ""), ((first,), "tenant"), ((), "")]
        ):
            request = asked(model, str(number), *items, cache_salt=salt)
            await tokens_of(engine, request)
            salts.append(seen_by(engine)["cache_salt"])
        assert salts[-1] is None
        assert len(set(salts)) == 5
        assert salts[3].endswith("tenant")
        # A text as long as one with an image: only what text prompts made may be told of.
        text = asked(model, "text")
        stored: set[bytes] = set()
        async with asyncio.timeout(10):
            async for event in engine.kv_events():
                if event.kind is KvEventKind.STORED:
                    stored.update(event.block_hashes)
                if len(stored) >= len(text.prompt_token_ids) // 8:
                    break
        from trtllm_workers.blocks import block_hashes, root_hash

        root = root_hash(engine._info.model_id)
        with_image = asked(model, "0", first)
        untold = set(block_hashes(with_image.prompt_token_ids, 8, root)) - set(
            block_hashes(text.prompt_token_ids, 8, root)
        )
        assert untold
        assert not untold & stored


async def test_an_image_at_the_beginning_is_in_no_event(model: Path) -> None:
    """Its placeholders come as ids that no text has."""
    from trtllm_workers.engines.trtllm.kv_index import KvIndex

    def stored(tokens: list[int]) -> dict[str, Any]:
        block = {"block_hash": 5, "tokens": [{"token_id": one} for one in tokens]}
        return {
            "data": {"type": "stored", "parent_hash": None, "blocks": [block]},
            "window_size": 1,
        }

    index = KvIndex("m", 4, 512, PAD)
    assert list(index.take(stored([1, 513, 513, 513]))) == []
    assert list(index.take(stored([1, PAD, PAD, PAD]))) == []
    assert index.counts.ambiguous == 2
    assert len(index.take(stored([1, 2, 3, 4]))) == 1


async def test_pins_last_as_long_as_the_request(model: Path) -> None:
    async with started(model) as engine:
        item = keep_rows(engine, b"a", rows_of(1))
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()
        engine.submit(asked(model, "1", item, max_tokens=150), chunks.put_nowait)
        await chunks.get()
        assert engine.media_store.num_pinned == 1
        engine.abort("1")
        async with asyncio.timeout(10):
            while (await chunks.get()).finish_reason is None:
                pass
        assert engine.media_store.num_pinned == 0
        store = engine.media_store
        engine.submit(asked(model, "2", item, max_tokens=150), chunks.put_nowait)
        await chunks.get()
    assert store.num_pinned == 0

"""Images on several adapters: prompts computed elsewhere, and a vision tower apart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.fakes.seeing import (
    HIDDEN,
    asked,
    keep_image,
    keep_rows,
    make_seeing_model,
    move,
)
from tests.fakes.stand_in import tensorrt_llm_stand_in
from tests.unit.trtllm_engine.image_stage import build, rows_of, seen_by, started, tokens_of
from trtllm_workers.engines.trtllm.failures import SUSPICIOUS_FAILURES
from trtllm_workers.engines.trtllm.tower import TowerEncoder
from trtllm_workers.errors import (
    ConfigError,
    EngineError,
    NotSupported,
)
from trtllm_workers.types import (
    FinishReason,
    MediaKind,
    Prefilled,
    Reservation,
    TokenChunk,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeing_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "1")
    monkeypatch.setenv("FAKE_TRTLLM_TRANSPORT", "tcp")
    with tensorrt_llm_stand_in():
        yield


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
async def test_a_prompt_with_images_is_computed_elsewhere(tmp_path: Path, family: str) -> None:
    folder = make_seeing_model(tmp_path / "model", family)
    async with (
        started(folder) as whole,
        started(folder, "prefill") as prefill,
        started(folder, "decode") as decode,
    ):
        assert decode.encoder is None
        assert not decode._info.vision.encodes
        item = keep_image(prefill, b"r")
        assert keep_image(whole, b"r") == item
        expected = await tokens_of(whole, asked(folder, "0", item))
        loop = asyncio.get_running_loop()
        made: asyncio.Future[Prefilled] = loop.create_future()
        held: asyncio.Future[Reservation] = loop.create_future()
        request = asked(folder, "1", item)
        prefill.prefill(request, made.set_result)
        decode.reserve(request, held.set_result)
        async with asyncio.timeout(20):
            prefilled, _ = await made, await held
        assert prefilled.first.finish_reason is None, prefilled.first
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()
        decode.resume("1", prefilled.first, chunks.put_nowait, prefilled.opaque)
        assert await drain(chunks) == expected
        # Its prompt was seen: decode gets tokens alone, and the same salt.
        seen = seen_by(decode)
        assert seen["inputs"] == request.prompt_token_ids
        assert seen["disaggregated_params"].request_type == "generation_only"
        assert seen["disaggregated_params"].multimodal_embedding_handles is None
        assert seen["cache_salt"] == seen_by(prefill)["cache_salt"]
        prefill.release("1")
        assert prefill.media_store.num_pinned == 0
        # Decode may have to compute the prompt itself; then it needs the bytes.
        again = msgspec.structs.replace(request, request_id="2")
        held = loop.create_future()
        decode.reserve(again, held.set_result)
        await held
        with pytest.raises(EngineError, match="are not here"):
            decode.resume("2", None, chunks.put_nowait)
        move(item, prefill, decode)
        decode.resume("2", None, chunks.put_nowait)
        assert await drain(chunks) == expected
        assert decode.media_store.num_pinned == 0


async def drain(chunks: asyncio.Queue[TokenChunk]) -> list[int]:
    tokens: list[int] = []
    async with asyncio.timeout(20):
        while True:
            chunk = await chunks.get()
            tokens += chunk.token_ids
            if chunk.finish_reason is not None:
                assert chunk.finish_reason is FinishReason.LENGTH, chunk
                return tokens


async def test_a_prompt_that_is_not_as_long_as_counted_is_not_handed_over(model: Path) -> None:
    async with started(model, "prefill") as prefill:
        item = keep_image(prefill, b"r")
        request = asked(model, "1", item)
        longer = msgspec.structs.replace(request, prompt_text=request.prompt_text + "!")
        made: asyncio.Future[Prefilled] = asyncio.get_running_loop().create_future()
        prefill.prefill(longer, made.set_result)
        async with asyncio.timeout(10):
            first = (await made).first
        assert first.finish_reason is FinishReason.ERROR
        assert "by our count" in (first.error_message or "")


async def test_a_prompt_that_is_not_as_long_as_counted_is_told_of(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with started(model) as engine:
        request = asked(model, "1", keep_image(engine, b"r"))
        longer = msgspec.structs.replace(request, prompt_text=request.prompt_text + "!")
        capsys.readouterr()
        assert await tokens_of(engine, longer)
        assert "usage and limits are not exact" in capsys.readouterr().out
        assert await tokens_of(engine, request)
        assert "not exact" not in capsys.readouterr().out


async def test_a_tower_apart_makes_embeddings_that_give_the_same_answer(model: Path) -> None:
    async with started(model) as whole, started(model, "encode", generates=False) as tower:
        assert isinstance(tower.encoder, TowerEncoder)
        assert tower._info.vision.encodes
        item = await asyncio.to_thread(keep_image, tower, b"e")
        assert (item.kind, item.num_bytes) == (
            MediaKind.EMBEDDINGS,
            item.num_tokens * HIDDEN * 4,
        )
        move(item, tower, whole)
        seen = keep_image(whole, b"r")
        assert seen.num_tokens == item.num_tokens
        expected = await tokens_of(whole, asked(model, "1", seen))
        assert await tokens_of(whole, asked(model, "2", item)) == expected
        # With a tower apart all is embeddings, so files of them mix with images.
        rows = keep_rows(whole, b"f", rows_of(1))
        assert await tokens_of(whole, asked(model, "3", item, rows))
        # Pixels that stay pixels are other items than those that were encoded.
        assert tower.encoder.fingerprint != whole.encoder.fingerprint
        with pytest.raises(NotSupported, match="encodes images and generates nothing"):
            tower.submit(asked(model, "4"), lambda _chunk: None)


async def test_a_tower_tells_what_failed_and_whether_it_is_broken(model: Path) -> None:
    async with started(model, "encode", generates=False) as tower:
        encoder = tower.encoder
        encoder._tower.fake_error = ValueError("one image cannot be encoded")
        with pytest.raises(EngineError, match="vision tower: one image cannot be encoded"):
            await asyncio.to_thread(keep_image, tower, b"e")
        encoder._tower.fake_error = None
        await asyncio.to_thread(keep_image, tower, b"e")
        encoder._tower.fake_error = RuntimeError("CUDA error: an illegal memory access")
        with pytest.raises(EngineError, match="CUDA error"):
            await asyncio.to_thread(keep_image, tower, b"f")
        async with asyncio.timeout(5):
            assert "vision tower is broken" in str(await tower.died())
    with pytest.raises(EngineError, match="the vision tower has ended"):
        encoder.encode(memoryview(bytes(3)), 1, 1, [])


async def test_a_tower_that_only_fails_is_broken(model: Path) -> None:
    async with started(model, "encode", generates=False) as tower:
        encoder = tower.encoder
        for failures in (SUSPICIOUS_FAILURES - 1, SUSPICIOUS_FAILURES):
            encoder._tower.fake_error = None
            await asyncio.to_thread(keep_image, tower, b"e")
            assert tower._death is None
            encoder._tower.fake_error = ValueError("no image can be encoded")
            for _ in range(failures):
                with pytest.raises(EngineError, match="no image can be encoded"):
                    await asyncio.to_thread(keep_image, tower, b"e")
        async with asyncio.timeout(5):
            assert "no image can be encoded" in str(await tower.died())


async def test_a_text_model_cannot_have_the_role_encode(tmp_path: Path) -> None:
    from tests.fakes.tiny_models import make_tiny_checkpoint

    text = make_tiny_checkpoint(tmp_path / "text")
    counts_not = make_seeing_model(tmp_path / "mistral", "mistral3")
    for folder, message in ((text, "is none"), (counts_not, "is of family mistral3")):
        engine = build(folder, "encode", generates=False)
        with pytest.raises(ConfigError, match=rf"role encode needs a vision-language.*{message}"):
            await engine.start()
        await engine.close()

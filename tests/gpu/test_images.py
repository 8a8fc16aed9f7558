"""What our notes believe of TensorRT-LLM and images without having seen it; which module relies on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.gpu.conftest import SMALL
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.engines.base import EngineOptions, generate
from trtllm_workers.engines.registry import build_engine
from trtllm_workers.engines.trtllm.engine import TrtllmEngine
from trtllm_workers.types import (
    FinishReason,
    GenerateRequest,
    MediaItem,
    Prefilled,
    SamplingParams,
    VisionInfo,
)

RED, BLUE = (220, 30, 30), (30, 30, 220)
SIZES = [(336, 336), (231, 517), (640, 300)]
NATIVE = {
    "disable_overlap_scheduler": True,
    "cache_transceiver_config.backend": "UCX",
    "cache_transceiver_config.max_tokens_in_buffer": 4096,
    "cache_transceiver_config.kv_transfer_timeout_ms": 60000,
}


@asynccontextmanager
async def started(
    folder: Path, keys: dict[str, Any] = SMALL, role: str = "aggregated", **options: Any
) -> AsyncIterator[TrtllmEngine]:
    config = EngineConfig("trtllm", {key: Setting(value, "test") for key, value in keys.items()})
    made = build_engine("trtllm", EngineOptions(folder, config, extra={"role": role}, **options))
    assert isinstance(made, TrtllmEngine)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


def tower(folder: Path) -> Any:
    return started(folder, {"max_batch_size": 4}, "encode", generates=False)


def item_of(
    engine: TrtllmEngine, name: bytes, color: tuple[int, int, int], size: tuple[int, int]
) -> MediaItem:
    """Encode a picture of one color and keep it."""
    encoder, store = engine.encoder, engine.media_store
    assert encoder is not None
    assert store is not None
    plan = encoder.plan(*size)
    claim = store.claim(plan.num_bytes)
    encoder.encode(memoryview(bytes(color) * (size[0] * size[1])), *size, claim.runs)
    item = MediaItem(
        name * 16,
        0,
        plan.num_tokens,
        plan.grid,
        kind=plan.kind,
        num_bytes=plan.num_bytes,
        size=size,
    )
    store.unpin(store.commit(claim, item))
    return item


def bytes_of(engine: TrtllmEngine, item: MediaItem) -> bytes:
    store = engine.media_store
    assert store is not None
    kept = store.pin(item.digest)
    assert kept is not None
    return b"".join(store.bytes_of(kept))


def keep(engine: TrtllmEngine, item: MediaItem, content: bytes) -> None:
    store = engine.media_store
    assert store is not None
    claim = store.claim(item.num_bytes)
    at = 0
    for piece in claim.runs:
        piece[:] = content[at : at + len(piece)]
        at += len(piece)
    store.unpin(store.commit(claim, item))


def vision_of(engine: TrtllmEngine) -> VisionInfo:
    assert engine._info is not None
    assert engine._info.vision is not None
    return engine._info.vision


def asked(
    folder: Path, vision: VisionInfo, name: str, items: Sequence[MediaItem], max_tokens: int = 16
) -> GenerateRequest:
    """Return a request as the ingress makes it."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
    content = [*({"type": "image"} for _ in items), {"type": "text", "text": "Which color is it?"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.count(vision.placeholder) == len(items)
    ids: list[int] = []
    media: list[MediaItem] = []
    for token in tokenizer(rendered, add_special_tokens=False).input_ids:
        if token == vision.image_token_id:
            item = items[len(media)]
            media.append(msgspec.structs.replace(item, offset=len(ids)))
            ids += [token] * item.num_tokens
        else:
            ids.append(token)
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=ids,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        media=tuple(media),
        prompt_text=rendered,
    )


def inputs_of(engine: TrtllmEngine, request: GenerateRequest) -> dict[str, Any]:
    """Return what the adapter gives TensorRT-LLM."""
    streams: Any = engine._streams
    store: Any = engine.media_store
    kept = [store.pin(item.digest) for item in request.media]
    made: dict[str, Any] = streams._prompts.inputs(request, kept)
    return made


async def tokens_of(engine: TrtllmEngine, request: GenerateRequest) -> list[int]:
    async with asyncio.timeout(120):
        chunks = [chunk async for chunk in generate(engine, request)]
    assert chunks[-1].finish_reason is FinishReason.LENGTH, chunks[-1]
    return [token for chunk in chunks for token in chunk.token_ids]


async def test_prompts_with_images_are_as_long_as_we_count(vision_model: Path) -> None:
    """config/vision_model.py; a prefill whose prompt is not is refused by engines/trtllm/streams.py."""
    async with started(vision_model) as engine:
        for number, size in enumerate(SIZES):
            item = item_of(engine, bytes([65 + number]), RED, size)
            request = asked(vision_model, vision_of(engine), f"r{number}", [item])
            await tokens_of(engine, request)
            inputs = inputs_of(engine, request)
            result = engine._llm.generate_async(inputs, _sampling(), cache_salt=f"alone {number}")
            await result
            assert len(result.prompt_token_ids) == len(request.prompt_token_ids), size


async def test_images_of_other_colors_give_other_answers_and_share_nothing(
    vision_model: Path,
) -> None:
    """engines/trtllm/images.py: salt_of."""
    async with started(vision_model) as engine:
        vision = vision_of(engine)
        red, blue = (
            item_of(engine, name, color, SIZES[0]) for name, color in ((b"r", RED), (b"b", BLUE))
        )
        first = await tokens_of(engine, asked(vision_model, vision, "1", [red]))
        assert await tokens_of(engine, asked(vision_model, vision, "2", [blue])) != first
        assert await tokens_of(engine, asked(vision_model, vision, "3", [red])) == first


async def test_embeddings_of_a_tower_apart_give_the_image_s_answer(vision_model: Path) -> None:
    """engines/trtllm/tower.py opens the handle once and copies; media_prompts.py gives the rows back."""
    async with tower(vision_model) as apart:
        items = [
            await asyncio.to_thread(item_of, apart, name, color, SIZES[1])
            for name, color in ((b"e", RED), (b"f", BLUE))
        ]
        contents = [bytes_of(apart, item) for item in items]
        again = await asyncio.to_thread(item_of, apart, b"g", RED, SIZES[1])
        assert bytes_of(apart, again) == contents[0]
        assert contents[0] != contents[1]
    async with started(vision_model) as engine:
        vision = vision_of(engine)
        for number, (item, content, color) in enumerate(
            zip(items, contents, (RED, BLUE), strict=True)
        ):
            keep(engine, item, content)
            pixels = item_of(engine, bytes([97 + number]), color, SIZES[1])
            expected = await tokens_of(engine, asked(vision_model, vision, f"i{number}", [pixels]))
            found = await tokens_of(engine, asked(vision_model, vision, f"e{number}", [item]))
            assert found == expected


async def test_with_token_ids_embeddings_are_dropped_in_silence(vision_model: Path) -> None:
    """engines/trtllm/media_prompts.py: require_seen. When this fails, the trap is gone."""
    async with tower(vision_model) as apart:
        items = [
            await asyncio.to_thread(item_of, apart, name, color, SIZES[1])
            for name, color in ((b"e", RED), (b"f", BLUE))
        ]
        contents = [bytes_of(apart, item) for item in items]
    async with started(vision_model) as engine:
        answers = []
        for number, (item, content) in enumerate(zip(items, contents, strict=True)):
            keep(engine, item, content)
            request = asked(vision_model, vision_of(engine), f"r{number}", [item])
            inputs = inputs_of(engine, request)
            del inputs["prompt"]
            inputs["prompt_token_ids"] = request.prompt_token_ids
            try:
                result = engine._llm.generate_async(inputs, _sampling(), cache_salt=str(number))
                answers.append(list((await result).outputs[0].token_ids))
            except Exception as error:  # noqa: BLE001 - refusing is as good
                print(f"refused: {error!r}")  # noqa: T201
                return
        assert answers[0] == answers[1]


async def test_a_prompt_with_an_image_goes_on_elsewhere(vision_model: Path) -> None:
    """engines/trtllm/handoff_state.py carries positions in space within one node."""
    async with started(vision_model) as whole:
        item = item_of(whole, b"r", RED, SIZES[1])
        expected = await tokens_of(whole, asked(vision_model, vision_of(whole), "1", [item]))
    keys = {**SMALL, **NATIVE, "kv_cache_config.free_gpu_memory_fraction": 0.2}
    async with (
        started(vision_model, keys, "prefill") as prefill,
        started(vision_model, keys, "decode") as decode,
    ):
        item = item_of(prefill, b"r", RED, SIZES[1])
        request = asked(vision_model, vision_of(prefill), "1", [item])
        loop = asyncio.get_running_loop()
        made: asyncio.Future[Prefilled] = loop.create_future()
        held: asyncio.Future[Any] = loop.create_future()
        prefill.prefill(request, made.set_result)
        decode.reserve(request, held.set_result)
        async with asyncio.timeout(120):
            prefilled, _ = await made, await held
            chunks: asyncio.Queue[Any] = asyncio.Queue()
            decode.resume("1", prefilled.first, chunks.put_nowait, prefilled.opaque)
            tokens: list[int] = []
            while True:
                chunk = await chunks.get()
                tokens += chunk.token_ids
                if chunk.finish_reason is not None:
                    break
        assert tokens == expected


@pytest.mark.parametrize("fits", [True, False])
async def test_rows_of_another_width_are_refused_and_the_engine_lives(
    vision_model: Path, fits: bool
) -> None:
    """engines/trtllm/streams.py takes what an input processor raises for the request's fault."""
    import torch

    async with started(vision_model) as engine:
        hidden = vision_of(engine).hidden_size - (not fits)
        text = asked(vision_model, vision_of(engine), "1", [MediaItem(b"x" * 16, 0, 4)]).prompt_text
        inputs = {
            "prompt": text,
            "multi_modal_embeddings": {"image": [torch.zeros(4, hidden, dtype=torch.bfloat16)]},
        }
        if fits:
            assert (await engine._llm.generate_async(inputs, _sampling())).outputs
        else:
            with pytest.raises(Exception, match=r".*") as caught:
                engine._llm.generate_async(inputs, _sampling())
            print(f"{caught.type.__name__}: {caught.value}")  # noqa: T201
        assert await tokens_of(engine, asked(vision_model, vision_of(engine), "2", []))


def _sampling() -> Any:
    from trtllm_workers.engines.trtllm.api import load_api

    return load_api().sampling_params(
        max_tokens=8, end_id=-1, pad_id=0, top_k=1, detokenize=False, add_special_tokens=False
    )

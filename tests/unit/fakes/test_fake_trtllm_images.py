"""The stand-in's traps with images: what TensorRT-LLM drops in silence, it drops too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.fakes.seeing import HIDDEN, PAD, make_seeing_model, tokenizer_of
from tests.fakes.stand_in import tensorrt_llm_stand_in

TEXT = "look: <image>!"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeing_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FAKE_TRTLLM_NUM_GPUS", "1")
    with tensorrt_llm_stand_in():
        yield


@asynccontextmanager
async def llm(model: Path) -> AsyncIterator[Any]:
    from tensorrt_llm.llmapi import LLM

    keys = {"max_num_tokens": 64, "kv_cache_config": {"tokens_per_block": 8, "max_tokens": 512}}
    made = await asyncio.to_thread(lambda: LLM(str(model), **keys))
    try:
        yield made
    finally:
        await asyncio.to_thread(made.shutdown)


async def tokens_of(made: Any, inputs: Any) -> tuple[list[int], list[int]]:
    from tensorrt_llm.llmapi import SamplingParams

    sampling = SamplingParams(max_tokens=6, end_id=-1, pad_id=0)
    result = made.generate_async(inputs, sampling, streaming=True)
    async with asyncio.timeout(20):
        async for output in result:
            last = output
    return list(last.outputs[0].token_ids), list(result.prompt_token_ids)


def rows(seed: int) -> torch.Tensor:
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(seed))


def embeddings(seed: int) -> dict[str, Any]:
    return {"multi_modal_embeddings": {"image": [rows(seed)]}}


async def test_embeddings_with_a_text_are_seen_and_with_token_ids_they_are_not(model: Path) -> None:
    ids = tokenizer_of(model)(TEXT).input_ids
    async with llm(model) as made:
        one, prompt = await tokens_of(made, {"prompt": TEXT, **embeddings(1)})
        two, _ = await tokens_of(made, {"prompt": TEXT, **embeddings(2)})
        assert one != two
        assert len(prompt) == len(ids) + 4
        assert prompt.count(513) == 5  # ids that no text has
        # Dropped, and nobody says so.
        blind = [await tokens_of(made, {"prompt_token_ids": ids, **embeddings(n)}) for n in (1, 2)]
        assert blind[0] == blind[1]
        assert blind[0][0] not in (one, two)
        # The text is made from the ids and tokenized again, with another beginning.
        assert len(blind[0][1]) == len(ids) + 1


async def test_beside_images_embeddings_are_dropped(model: Path) -> None:
    async with llm(model) as made:
        image = {"multi_modal_data": {"image": [Image.new("RGB", (50, 30), "red")]}}
        alone, _ = await tokens_of(made, {"prompt": TEXT, **image})
        both, _ = await tokens_of(made, {"prompt": TEXT, **image, **embeddings(1)})
        assert both == alone
        other = {"multi_modal_data": {"image": [Image.new("RGB", (50, 30), "blue")]}}
        assert (await tokens_of(made, {"prompt": TEXT, **other}))[0] != alone


async def test_what_it_refuses(model: Path) -> None:
    async with llm(model) as made:
        with pytest.raises(ValueError, match="must be a dictionary"):
            await tokens_of(made, {"prompt": TEXT, "multi_modal_embeddings": [rows(1)]})
        with pytest.raises(ValueError, match="Only image modality"):
            await tokens_of(made, {"prompt": TEXT, "multi_modal_embeddings": {"video": [1]}})
        with pytest.raises(AssertionError, match="consumed"):
            await tokens_of(made, {"prompt": TEXT * 2, **embeddings(1)})
        wrong = {"multi_modal_embeddings": {"image": [torch.ones(5, HIDDEN + 1)]}}
        with pytest.raises(AssertionError, match="hidden_size"):
            await tokens_of(made, {"prompt": TEXT, **wrong})
        assert (await tokens_of(made, "no image"))[0]


def test_a_handle_of_the_encoder_s_can_be_opened_once(model: Path) -> None:
    from tensorrt_llm._torch.shared_tensor import SharedTensorContainer
    from tensorrt_llm.inputs.eyes import Eyes
    from tensorrt_llm.llmapi import MultimodalEncoder

    encoder = MultimodalEncoder(str(model))
    picture = Image.new("RGB", (50, 30), "red")
    result = encoder.generate_async({"prompt": "<image>", "multi_modal_data": {"image": [picture]}})
    result = result.result(5)
    (handle,) = result.disaggregated_params.multimodal_embedding_handles
    assert result.mm_embedding_handle is handle
    tensor = SharedTensorContainer.from_dict(handle).get_local_view()
    assert list(tensor.shape) == handle["tensor_size"]
    assert torch.equal(tensor, Eyes(model).look(picture))
    with pytest.raises(FileNotFoundError):
        SharedTensorContainer.from_dict(handle).get_local_view()
    encoder.shutdown()
    with pytest.raises(RuntimeError, match="shutting down"):
        encoder.generate_async({"prompt": "<image>", "multi_modal_data": {"image": [picture]}})


def test_the_loader_takes_images_or_embeddings_of_images_only(model: Path) -> None:
    from tensorrt_llm.inputs import default_multimodal_input_loader

    shared: dict[str, Any] = {
        "tokenizer": tokenizer_of(model),
        "model_dir": str(model),
        "model_type": "llava_next",
        "prompts": ["x"],
    }
    with pytest.raises(ValueError, match="Either media or mm_embeddings"):
        default_multimodal_input_loader(modality="image", **shared)
    with pytest.raises(ValueError, match="not supported for modality video"):
        default_multimodal_input_loader(modality="video", mm_embeddings=[rows(1)], **shared)
    (made,) = default_multimodal_input_loader(modality="image", mm_embeddings=[rows(1)], **shared)
    assert set(made) == {"prompt", "multi_modal_embeddings"}
    assert tokenizer_of(model)(made["prompt"]).input_ids.count(PAD) == 1

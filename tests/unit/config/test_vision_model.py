"""How many tokens images become: the same as transformers' own processors say, for odd sizes too."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaNextProcessor, LlavaProcessor, Qwen2VLProcessor
from transformers.models.llava.image_processing_pil_llava import (
    LlavaImageProcessorPil,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trtllm_workers.config.vision_model import VisionModel, read_vision
from trtllm_workers.errors import ConfigError, MediaRejected

_random = random.Random(7)
SIZES = [
    *((1, 1), (1, 199), (199, 1), (28, 28), (27, 29), (56, 56), (55, 57), (1000, 5), (4000, 3000)),
    *((336, 336), (672, 336), (335, 671), (1008, 337), (333, 1000), (720, 1280), (8191, 4097)),
    *((_random.randint(1, 3000), _random.randint(15, 3000)) for _ in range(200)),
]
QWEN = {
    "model_type": "qwen2_vl",
    "hidden_size": 64,
    "torch_dtype": "bfloat16",
    "image_token_id": 300,
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": 300,
    "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "hidden_size": 64},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
LLAVA_NEXT = {**LLAVA, "model_type": "llava_next", "image_grid_pinpoints": PINPOINTS}


def write(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def vision_of(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> VisionModel:
    found = read_vision(write(folder, config, **files))
    assert found is not None
    return found


class Tokenizer:
    """As much of one as a processor asks when nobody has it process text."""

    image_token = "<image>"
    image_token_id = 300
    video_token = "<video>"
    video_token_id = 301

    def encode(self, _text: str, **_more: Any) -> list[int]:
        return [300]


# Their signatures are made of typed dicts that a checker takes literally.
QwenImages: Any = Qwen2VLImageProcessorPil
LlavaImages: Any = LlavaImageProcessorPil
LlavaNextImages: Any = LlavaNextImageProcessorPil


def processor(kind: Any, images: Any, **fields: Any) -> Any:
    made = kind.__new__(kind)
    made.image_processor, made.tokenizer = images, Tokenizer()
    made.image_token_id = 300
    for name, value in fields.items():
        setattr(made, name, value)
    made._merge_kwargs = lambda **_kwargs: {"images_kwargs": {}}
    return made


def expected(made: Any, size: tuple[int, int]) -> int:
    (found,) = made._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"]
    return int(found)


@pytest.mark.parametrize(
    "bounds",
    [{}, {"min_pixels": 3136, "max_pixels": 12845056}, {"min_pixels": 50176, "max_pixels": 200704}],
)
def test_qwen_counts_as_its_processor_does(tmp_path: Path, bounds: dict[str, int]) -> None:
    model = vision_of(tmp_path, QWEN, preprocessor_config={"patch_size": 14, **bounds})
    images = QwenImages(**bounds)
    made = processor(Qwen2VLProcessor, images)
    for size in SIZES:
        num_tokens, grid = model.size_of(*size)
        assert grid is not None
        assert num_tokens == expected(made, size) == math.prod(grid)
        assert model.check_grid(num_tokens, grid) == grid


def test_a_qwen_grid_is_the_processor_s_in_merged_patches(tmp_path: Path) -> None:
    from PIL import Image

    model = vision_of(tmp_path, QWEN)
    images = QwenImages()
    for height, width in [(31, 97), (200, 333), (64, 64)]:
        made = images.preprocess([Image.new("RGB", (width, height))], return_tensors="np")
        time, rows, columns = made["image_grid_thw"][0].tolist()
        assert model.size_of(height, width)[1] == (time, rows // 2, columns // 2)


@pytest.mark.parametrize("nested", [True, False])
def test_newer_folders_keep_the_bounds_elsewhere(tmp_path: Path, nested: bool) -> None:
    images = {"size": {"shortest_edge": 50176, "longest_edge": 200704}}
    files: dict[str, Any] = (
        {"processor_config": {"image_processor": images}, "preprocessor_config": {"min_pixels": 1}}
        if nested
        else {"preprocessor_config": images, "processor_config": {"processor_class": "x"}}
    )
    model = vision_of(tmp_path, QWEN, **files)
    made = processor(Qwen2VLProcessor, QwenImages(**images))
    for size in SIZES[:40]:
        assert model.size_of(*size)[0] == expected(made, size)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_llava_counts_as_its_processor_does(tmp_path: Path, strategy: str, tower: str) -> None:
    config = {**LLAVA, "vision_feature_select_strategy": strategy}
    config["vision_config"] = {"model_type": tower, "image_size": 336, "patch_size": 14}
    model = vision_of(tmp_path, config)
    made = processor(
        LlavaProcessor,
        LlavaImages(crop_size={"height": 336, "width": 336}),
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower == "clip_vision_model"),
    )
    for size in SIZES[:20]:
        assert model.size_of(*size) == (expected(made, size), None)
    assert model.size_of(5, 5)[0] in (575, 576, 577)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_llava_next_counts_as_its_processor_does(tmp_path: Path, strategy: str) -> None:
    model = vision_of(tmp_path, {**LLAVA_NEXT, "vision_feature_select_strategy": strategy})
    images = LlavaNextImages(size={"shortest_edge": 336}, image_grid_pinpoints=PINPOINTS)
    made = processor(
        LlavaNextProcessor,
        images,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )
    for size in SIZES:
        assert model.size_of(*size) == (expected(made, size), None), size


def test_what_is_read_of_a_qwen_folder(tmp_path: Path) -> None:
    model = vision_of(tmp_path, QWEN)
    assert (model.family, model.image_token_id, model.placeholder) == (
        "qwen2_vl",
        300,
        "<|image_pad|>",
    )
    assert (model.hidden_size, model.dtype) == (64, "bfloat16")
    assert (model.spatial_merge_size, model.uses_grid, model.counts_tokens) == (2, True, True)


def test_the_placeholder_is_the_token_s_own_text(tmp_path: Path) -> None:
    decoder = {"added_tokens_decoder": {"300": {"content": "<pic>"}}}
    assert vision_of(tmp_path, LLAVA, tokenizer_config=decoder).placeholder == "<pic>"
    large = {"added_tokens": [{"id": 1, "content": "</s>"}, {"id": 300, "content": "<look>"}]}
    found = vision_of(tmp_path, LLAVA, tokenizer_config={}, tokenizer=large)
    assert found.placeholder == "<look>"
    assert vision_of(tmp_path, LLAVA, tokenizer={}).placeholder == "<image>"


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {}, {"model_type": "whisper"}])
def test_a_text_model_has_no_eyes(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read_vision(write(tmp_path, config)) is None


@pytest.mark.parametrize("family", ["llama4", "mistral3"])
def test_a_family_whose_images_cannot_be_counted_takes_embeddings(
    tmp_path: Path, family: str
) -> None:
    model = vision_of(tmp_path, {"model_type": family, "text_config": {"hidden_size": 64}})
    assert not model.counts_tokens
    assert model.check_grid(9, None) is None
    with pytest.raises(MediaRejected, match=f"family {family}.*send precomputed embeddings"):
        model.size_of(100, 100)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (None, "without their grid"),
        ((1, 3, 4), "grid of 1 × 3 × 4 does not make 10"),
        ((1, -2, -5), "does not make 10"),
        ((2, 1, 5), "a video's"),
    ],
)
def test_a_wrong_grid_is_refused(
    tmp_path: Path, grid: tuple[int, int, int] | None, message: str
) -> None:
    with pytest.raises(MediaRejected, match=message):
        vision_of(tmp_path, QWEN).check_grid(10, grid)


def test_what_shows_nothing_or_is_too_long_is_refused(tmp_path: Path) -> None:
    model = vision_of(tmp_path, QWEN)
    for size in [(0, 5), (5, 0)]:
        with pytest.raises(MediaRejected, match="shows nothing"):
            model.size_of(*size)
    with pytest.raises(MediaRejected, match="at most 200 times"):
        model.size_of(1, 201)
    assert model.size_of(1, 200)
    with pytest.raises(MediaRejected, match="no use for"):
        vision_of(tmp_path, LLAVA).check_grid(6, (1, 2, 3))


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({**QWEN, "image_token_id": "x"}, {}, "'image_token_id' must be a whole number"),
        ({**QWEN, "hidden_size": None}, {}, "'hidden_size' is missing"),
        (QWEN, {"preprocessor_config": {"patch_size": 16}}, "patch_size 16, config.json 14"),
        ({**LLAVA_NEXT, "image_grid_pinpoints": [1, 2]}, {}, "image_grid_pinpoints"),
    ],
)
def test_a_broken_folder_is_named(
    tmp_path: Path, config: dict[str, Any], files: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_vision(write(tmp_path, config, **files))

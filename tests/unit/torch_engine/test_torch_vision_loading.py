"""Checkpoints of images and text load under old and new names; those that cannot are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.torch_engine.driver import Driver, prompt_of
from tests.unit.torch_engine.images import FAMILIES, encode, image_of, place
from tests.unit.torch_engine.test_torch_loading import change_config, load_with
from trtllm_workers.config.keys import default_config
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.demo.vision import write_vision_model
from trtllm_workers.engines.torch.checkpoint import Checkpoint
from trtllm_workers.engines.torch.eyes import load_eyes
from trtllm_workers.engines.torch.loading import Loaded, load, make_plan
from trtllm_workers.engines.torch.model_config import read_model_config
from trtllm_workers.engines.torch.ranks import Ranks
from trtllm_workers.engines.torch.settings import KEYS
from trtllm_workers.errors import ConfigError


def tokens_of(loaded: Loaded) -> list[int]:
    vision = loaded.vision
    assert vision is not None
    assert vision.encoder is not None
    item = encode(vision.encoder, vision.store, image_of(1))
    prompt, media = place([prompt_of(0, 9), item, prompt_of(1, 9)], vision.info.image_token_id)
    return Driver(loaded, reuse=True, chunked=True).ask(prompt, 16, media=media)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_old_and_new_are_one_model(family: str, tmp_path: Path) -> None:
    folders = [
        write_vision_model(tmp_path / str(old), family, old_names=old) for old in (True, False)
    ]
    names = [set(load_file(folder / "model.safetensors")) for folder in folders]
    assert names[0] != names[1]
    assert tokens_of(load_with(folders[0])) == tokens_of(load_with(folders[1]))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_arguments_write_equal_models_and_seeds_differ(family: str, tmp_path: Path) -> None:
    folders = [
        write_vision_model(tmp_path / str(n), family, seed=seed) for n, seed in enumerate((1, 1, 2))
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    assert sum(len(weight) for weight in weights) < 12 << 20


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_itself_loads(
    family: str, vision_model: Callable[[str], Path], tmp_path: Path
) -> None:
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = vision_model(family)
    kind: Any = transformers.AutoModelForImageTextToText
    kind.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_bytes((folder / name).read_bytes())
    assert tokens_of(load_with(tmp_path / "saved")) == tokens_of(load_with(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_may_be_part_of_processor_config(family: str, tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "model", family)
    expected = tokens_of(load_with(folder))
    own = folder / "preprocessor_config.json"
    content = {"image_processor": json.loads(own.read_text()), "processor_class": "Any"}
    own.unlink()
    (folder / "processor_config.json").write_text(json.dumps(content))
    assert tokens_of(load_with(folder)) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_towers_give_bfloat16_rows(family: str, tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "model", family, dtype="bfloat16")
    loaded = load_with(folder)
    vision = loaded.vision
    assert vision is not None
    assert vision.encoder is not None
    assert vision.info.dtype == loaded.info.dtype == "bfloat16"
    wide = load_with(folder, dtype="float32").vision
    assert wide is not None
    assert wide.encoder is not None
    assert wide.encoder.fingerprint != vision.encoder.fingerprint
    image = image_of(1)
    rows = []
    for each in (vision, wide):
        assert each.encoder is not None
        encode(each.encoder, each.store, image)
        rows.append(each.rows[: each.encoder.plan(*image.shape[:2]).num_tokens].float())
    assert (rows[0] - rows[1]).abs().mean() < 0.05 * rows[1].abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_tower_is_read_for_encoding_and_only_the_rest_without(
    family: str, vision_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:

    taken: list[str] = []
    take = Checkpoint.take

    def noted(self: Checkpoint, name: str, *shape: int, **options: Any) -> torch.Tensor:
        taken.append(name)
        return take(self, name, *shape, **options)

    monkeypatch.setattr(Checkpoint, "take", noted)
    folder = vision_model(family)
    config = default_config("torch", KEYS, kv_cache_config__max_tokens=1024)
    shares: list[float] = []
    load_eyes(folder, config, shares.append, MediaSettings())
    eyes = set(taken)
    taken.clear()
    load(folder, config, shares.append, encodes=False)
    rest = set(taken)
    names = set(load_file(folder / "model.safetensors"))
    assert eyes | rest == names
    assert not eyes & rest
    assert all("visual" in n or "vision_tower" in n or "projector" in n for n in eyes)
    taken.clear()
    shares.clear()
    load(folder, config, shares.append)
    assert set(taken) == names
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_a_missing_weight_of_the_tower_is_named(tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "model", "llava")
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, path)
    with pytest.raises(ConfigError, match=r"no tensor '.*multi_modal_projector\.linear_1\.weight'"):
        load_with(folder)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("llava", {"architectures": ["LlavaNextForConditionalGeneration"]}, "LlavaNext.*Llava"),
        ("llava", {"model_type": "qwen2_vl"}, "'model_type' is 'qwen2_vl'"),
        ("llava", {"text_config": {"model_type": "gemma"}}, "text part of type 'gemma'"),
        ("llava", {"text_config": 3}, "'text_config' must be an object"),
        (
            "qwen2_vl",
            {"rope_scaling": {"type": "yarn", "mrope_section": [4, 2, 2]}},
            "rope type 'yarn' is not supported for a model whose positions",
        ),
        ("qwen2_vl", {"rope_scaling": {"type": "mrope"}}, r"'mrope_section' .* \(8\), not None"),
        (
            "qwen2_5_vl",
            {"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]}},
            "'mrope_section'",
        ),
        ("qwen2_vl", {"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_configs_that_cannot_be_served_are_refused_by_name(
    family: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_vision_model(tmp_path / "model", family)
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=message):
        load_with(folder)


def test_a_processor_that_does_not_fit_the_tower_is_refused(tmp_path: Path) -> None:
    folder = write_vision_model(tmp_path / "model", "llava")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "crop_size": {"height": 24, "width": 24}}))
    with pytest.raises(ConfigError, match=r"prepared as \[24, 24\]"):
        load_with(folder)
    path.write_text(json.dumps({**settings, "image_processor_type": "BlipImageProcessor"}))
    with pytest.raises(ConfigError, match="'BlipImageProcessor' is not supported"):
        load_with(folder)
    path.unlink()
    with pytest.raises(ConfigError, match=r"holds no preprocessor_config\.json"):
        load_with(folder)


def test_one_rank_serves_a_model_of_images(tmp_path: Path) -> None:

    class Two:
        size = 2
        rank = 0

    folder = write_vision_model(tmp_path / "model", "llava")
    assert load_with(folder).info.tensor_parallel_size == 1
    config = default_config("torch", KEYS, tensor_parallel_size=2)
    two: Any = Two()
    ranks: Ranks = two
    with pytest.raises(ConfigError, match="runs on one rank"):
        make_plan(folder, config, ranks)


def test_text_parts_may_leave_out_what_is_usual(tmp_path: Path) -> None:
    # As llava-1.5's config.json does.
    folder = write_vision_model(tmp_path / "model", "llava")
    change_config(
        folder,
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
    )
    config = read_model_config(folder)
    assert (config.hidden_size, config.num_layers, config.num_kv_heads) == (4096, 32, 32)
    assert (config.vocab_size, config.max_positions) == (32064, 4096)
    change_config(folder, text_config={"model_type": "mistral"})
    config = read_model_config(folder)
    assert (config.intermediate_size, config.num_kv_heads) == (14336, 8)

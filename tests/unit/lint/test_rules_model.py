"""What config.json and file sizes tell of a model: its shape, its parameters, its quantisation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.lint.documents import (
    DEEPSEEK_V3,
    GIB,
    GPT_OSS_120B,
    LLAMA4_MAVERICK,
    LLAMA_8B,
    decode,
    model_folder,
)
from trtllm_workers.errors import ConfigError
from trtllm_workers.lint.rules.budget import model_weights
from trtllm_workers.lint.rules.kv import gpu_kv_bytes_per_token, kv_bytes_per_token
from trtllm_workers.lint.rules.model import Model, read_model


def model(folder: Path, config: Mapping[str, Any], stored_bytes: int | None = None) -> Model:
    return read_model(model_folder(folder / "model", config, stored_bytes=stored_bytes))


def parameters(known: Model) -> float:
    counted = known.attention_parameters + known.dense_parameters
    return (counted + known.expert_parameters + known.embedding_parameters) / 1e9


@pytest.mark.parametrize(
    ("config", "billions"),
    [(LLAMA_8B, 8.03), (DEEPSEEK_V3, 671.0), (LLAMA4_MAVERICK, 400.7), (GPT_OSS_120B, 116.8)],
    ids=["llama-8b", "deepseek-v3", "llama-4-maverick", "gpt-oss-120b"],
)
def test_parameters_are_those_that_the_makers_publish(
    tmp_path: Path, config: Mapping[str, Any], billions: float
) -> None:
    assert parameters(model(tmp_path, config)) == pytest.approx(billions, rel=0.002)


def test_shape_of_a_multimodal_model_is_its_language_models(tmp_path: Path) -> None:
    known = model(tmp_path, LLAMA4_MAVERICK)
    assert (known.heads, known.layers, known.experts, known.moe_layers) == (40, 48, 128, 24)
    assert known.dtype == "bfloat16"


def test_weights_as_stored_beat_what_config_json_gives(tmp_path: Path) -> None:
    weights = model_weights(model(tmp_path, LLAMA_8B, stored_bytes=8 * GIB))
    assert weights.total == pytest.approx(8 * GIB)
    assert weights.stored
    assert not model_weights(model(tmp_path / "b", LLAMA_8B)).stored


def test_weights_are_measured_by_file_size_without_an_index(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", LLAMA_8B)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x" * 700)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"x" * 300)
    (folder / "consolidated.safetensors").write_bytes(b"x" * 1000)
    assert read_model(folder).stored_bytes == 1000


@pytest.mark.parametrize(
    ("described", "quantization", "kv_dtype"),
    [
        ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, "nvfp4", "fp8"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}, "fp8", ""),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "int4", ""),
    ],
)
def test_quantisation_stands_in_hf_quant_config(
    tmp_path: Path, described: Mapping[str, Any], quantization: str, kv_dtype: str
) -> None:
    folder = model_folder(tmp_path / "model", LLAMA_8B)
    (folder / "hf_quant_config.json").write_text(json.dumps(described))
    known = read_model(folder)
    assert (known.quantization, known.kv_dtype) == (quantization, kv_dtype)


def test_quantisation_of_eight_bits_by_gptq_is_no_four_bits(tmp_path: Path) -> None:
    config = {**LLAMA_8B, "quantization_config": {"quant_method": "gptq", "bits": 8}}
    assert model(tmp_path, config).weight_bytes == 1


def test_a_folder_without_config_json_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model(tmp_path)


def test_layers_that_keep_a_state_have_no_kv(tmp_path: Path) -> None:
    hybrid = {**LLAMA_8B, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8}
    interval = {**LLAMA_8B, "full_attention_interval": 4}
    for name, config in (("a", hybrid), ("b", interval)):
        known = model(tmp_path / name, config)
        assert kv_bytes_per_token(decode(), known) == 8 * 2 * 8 * 128 * 2
        halved = decode(pipeline_parallel_size=2)
        assert gpu_kv_bytes_per_token(halved, known) == 4 * 2 * 8 * 128 * 2


def test_shared_experts_count_once_for_each_layer(tmp_path: Path) -> None:
    moe = {**LLAMA_8B, "num_experts": 4, "moe_intermediate_size": 100}
    plain = model(tmp_path / "a", moe).dense_parameters
    for name, more in (
        ("b", {"n_shared_experts": 2}),
        ("c", {"shared_expert_intermediate_size": 200}),
    ):
        known = model(tmp_path / name, {**moe, **more})
        assert known.dense_parameters - plain == 32 * 3 * 4096 * 200


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ({}, 32),
        ({"first_k_dense_replace": 2}, 30),
        ({"decoder_sparse_step": 2}, 16),
        ({"mlp_only_layers": [0, 1, 2]}, 29),
        ({"moe_layers": [1, 3, 5]}, 3),
    ],
)
def test_layers_of_experts(tmp_path: Path, more: Mapping[str, Any], layers: int) -> None:
    assert model(tmp_path, {**LLAMA_8B, "num_experts": 4, **more}).moe_layers == layers

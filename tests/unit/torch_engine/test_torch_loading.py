"""Model folders that cannot be served are refused by file, key or tensor; the others load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.tiny_models import make_tiny_checkpoint
from trtllm_workers.config.keys import default_config
from trtllm_workers.engines.torch.checkpoint import model_id_of
from trtllm_workers.engines.torch.loading import Loaded, load
from trtllm_workers.engines.torch.settings import KEYS
from trtllm_workers.errors import ConfigError


def load_with(folder: Path, **settings: Any) -> Loaded:
    chosen = {"kv_cache_config__max_tokens": 1024, **settings}
    return load(folder, default_config("torch", KEYS, **chosen), lambda _share: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_checkpoint(tmp_path / "model")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"MixtralForCausalLM.*LlamaForCausalLM.*Qwen3"),
        ({"architectures": ...}, r"no architecture.*MistralForCausalLM"),
        ({"hidden_size": ...}, r"config\.json: 'hidden_size'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be a positive"),
        ({"num_key_value_heads": 3}, "4 attention heads over 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "'factor' must be a positive"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"intermediate_size": 96}, r"gate_proj\.weight' has shape \[128, 64\].*\[96, 64\]"),
        ({"num_hidden_layers": 3}, r"no tensor 'model\.layers\.2\."),
        ({"tie_word_embeddings": False, "vocab_size": 400}, "embed_tokens"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_by_name(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=message):
        load_with(folder)


def test_missing_weights_name_the_tensor_and_the_folder(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_with(folder)


def test_weights_that_are_no_floating_point_are_refused(folder: Path) -> None:
    def quantize(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)

    change_weights(folder, quantize)
    with pytest.raises(ConfigError, match=r"'lm_head\.weight' holds torch\.int8"):
        load_with(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, 20_000, -1])
def test_a_truncated_file_is_named(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors: no safetensors file: .*cut short"):
        load_with(folder)


def test_a_truncated_or_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", num_shards=3)
    load_with(folder)
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ConfigError, match=r"model-00002-of-00003\.safetensors: cannot read tensor"):
        load_with(folder)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00003\.safetensors is missing"):
        load_with(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"index\.json: no weight_map"):
        load_with(folder)


def test_a_folder_without_safetensors_says_what_to_do(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor .*convert"):
        load_with(folder)


def test_shards_and_one_file_give_the_same_weights(tmp_path: Path, folder: Path) -> None:
    sharded = make_tiny_checkpoint(tmp_path / "sharded", num_shards=4)
    x = torch.randn(3, 64)
    one, many = load_with(folder).model, load_with(sharded).model
    assert one.head is not None
    assert many.head is not None
    assert torch.equal(one.head(x), many.head(x))
    assert torch.equal(one.linears[0](x), many.linears[0](x))


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [(1, [2, 3], (2, 3)), ([4, 5], None, (4, 5)), (6, None, (6,)), (None, None, ())],
)
def test_eos_ids_come_from_generation_config_first(
    folder: Path, in_config: Any, in_generation: Any, expected: tuple[int, ...]
) -> None:
    change_config(folder, eos_token_id=in_config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    assert load_with(folder).info.eos_token_ids == expected


def test_progress_rises_to_the_whole(folder: Path) -> None:
    shares: list[float] = []
    load(folder, default_config("torch", KEYS, kv_cache_config__max_tokens=64), shares.append)
    assert shares == sorted(shares)
    assert len(shares) == 21
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("checkpoint", "asked", "expected"),
    [
        ("float32", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_dtype_is_the_checkpoint_s_unless_asked_otherwise(
    tmp_path: Path, checkpoint: str, asked: str, expected: str
) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", dtype=checkpoint)
    info = load_with(folder, dtype=asked).info
    assert info.dtype == expected
    assert info.layout is not None
    assert info.layout.dtype == expected


def test_float16_is_computed_in_another_dtype_on_a_cpu(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", dtype="float16")
    assert load_with(folder).info.dtype in ("bfloat16", "float32")


def test_pool_and_lengths_follow_the_settings(folder: Path) -> None:
    info = load_with(
        folder, kv_cache_config__max_tokens=1000, kv_cache_config__tokens_per_block=32
    ).info
    assert (info.num_blocks, info.max_seq_len) == (31, 31 * 32)  # the pool bounds a request
    info = load_with(folder, kv_cache_config__max_tokens=None, max_batch_size=3).info
    assert (info.num_blocks, info.max_seq_len) == (3 * 64, 2048)
    assert load_with(folder, max_seq_len=100).info.max_seq_len == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_len": 4096}, r"max_seq_len 4096 \(override\).*2048"),
        ({"kv_cache_config__max_tokens": 10}, r"kv_cache_config\.max_tokens 10 \(override\).*32"),
        ({"kv_cache_config__max_tokens": 10**12}, r"asks for .* GiB .* are free on cpu; lower it"),
    ],
)
def test_impossible_sizes_name_the_key_and_its_source(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_with(folder, **settings)


def test_the_model_id_is_the_same_for_copies_and_another_for_other_weights(
    tmp_path: Path, folder: Path
) -> None:
    copy = make_tiny_checkpoint(tmp_path / "elsewhere" / "model")
    other = make_tiny_checkpoint(tmp_path / "other" / "model", seed=1)
    assert model_id_of(copy) == model_id_of(folder)
    assert model_id_of(other) != model_id_of(folder)


def test_slower_kernels_keep_rows_apart_where_weights_cannot_be_packed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtllm_workers.engines.torch.model.can_pack", lambda *_args: False)
    loaded = load_with(folder)
    assert not loaded.model.packed
    assert loaded.deterministic


def test_packed_weights_that_depend_on_the_batch_are_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtllm_workers.engines.torch import linear

    honest = linear._product

    def dependent(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return honest(x, weight, bias) + (1e-6 if x.shape[0] > 16 else 0)

    monkeypatch.setattr(linear, "_product", dependent)
    loaded = load_with(folder)
    assert not loaded.model.packed
    assert loaded.deterministic


def test_an_engine_that_cannot_keep_rows_apart_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "trtllm_workers.engines.torch.invariance.ForwardCheck.is_invariant", lambda _self: False
    )
    assert not load_with(folder).deterministic
    assert "may depend on batch mates" in capsys.readouterr().out

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.config.engine_config import (
    Override,
    load_engine_config,
    parse_override,
    show_config,
)
from trtllm_workers.config.keys import Key
from trtllm_workers.errors import ConfigError

KEYS = {
    "max_batch_size": Key(int, 16, "requests that run at once", minimum=1, maximum=4096),
    "max_seq_len": Key(int, None, "longest sequence", minimum=2, optional=True),
    "enable_chunked_prefill": Key(bool, True, "prefill in pieces"),
    "dtype": Key(str, "auto", "of the weights", choices=("auto", "float32", "bfloat16")),
    "kv_cache_config.tokens_per_block": Key(int, 32, "tokens per block", minimum=1),
    "kv_cache_config.free_gpu_memory_fraction": Key(
        float, 0.9, "share of memory", minimum=0, maximum=1
    ),
}

Golden = Callable[[str, str], None]


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "engine.yaml"
    path.write_text(text)
    return path


def load(path: Path | None, *overrides: Override) -> dict[str, tuple[Any, str]]:
    config = load_engine_config("torch", KEYS, path, overrides)
    return {key: (setting.value, setting.source) for key, setting in config.settings.items()}


def problems(path: Path | None, *overrides: Override) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    return str(caught.value)


def test_config_without_file_holds_every_default() -> None:
    assert load(None) == {key: (spec.default, "default") for key, spec in KEYS.items()}


def test_values_of_a_file_name_file_and_line(in_tmp: Path) -> None:
    path = write(in_tmp, "max_batch_size: 8\nkv_cache_config:\n  tokens_per_block: 64\n")
    settings = load(path)
    assert settings["max_batch_size"] == (8, "engine.yaml:1")
    assert settings["kv_cache_config.tokens_per_block"] == (64, "engine.yaml:3")
    assert settings["dtype"] == ("auto", "default")


def test_an_int_is_taken_for_a_float_and_an_exponent_needs_no_point(in_tmp: Path) -> None:
    key = "kv_cache_config.free_gpu_memory_fraction"
    whole = load(write(in_tmp, "kv_cache_config: {free_gpu_memory_fraction: 1}"))[key][0]
    assert (whole, type(whole)) == (1.0, float)
    assert load(write(in_tmp, "kv_cache_config: {free_gpu_memory_fraction: 8e-1}"))[key][0] == 0.8


def test_null_is_taken_where_the_key_allows_it_and_refused_elsewhere(in_tmp: Path) -> None:
    assert load(write(in_tmp, "max_seq_len: null"))["max_seq_len"][0] is None
    assert load(None, parse_override("max_seq_len=null", "--set"))["max_seq_len"][0] is None
    assert "must be a whole number, not null" in problems(write(in_tmp, "max_batch_size:"))


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("off", False), ("True", True)])
def test_old_words_for_booleans_are_booleans_where_one_is_expected(
    in_tmp: Path, word: str, value: bool
) -> None:
    path = write(in_tmp, f"enable_chunked_prefill: {word}")
    assert load(path)["enable_chunked_prefill"][0] is value


def test_every_problem_is_reported_at_once(in_tmp: Path, golden: Golden) -> None:
    path = write(
        in_tmp,
        """\
max_batch_size: 0
max_seq_len: 010
dtype: off
enable_chunked_prefill: 1
kv_cache_config:
  free_gpu_memory_fracton: 0.9
  free_gpu_memory_fraction: 1.5
  tokens_per_block: "32"
torch_compile_config:
  enable_inductor: true
  capture_num_tokens: [1, 2]
lora_config: {}
speculative_config:
  decoding_type: MTP
  num_nextn_predict_layer: 1
tokens_per_block: 16
kv_cache_dtype: fp8
max_input_len:
kv_cache_config.max_tokens: 4
entirely_made_up: {a: 1}
""",
    )
    golden("config/engine_yaml_errors.txt", problems(path))


def test_problems_of_overrides_name_the_flag(golden: Golden) -> None:
    golden(
        "config/override_errors.txt",
        problems(
            None,
            parse_override("max_batch_size=many", "--set"),
            parse_override("dtype=bfloat", "--set"),
            parse_override("kv_cache_config.tokens_per_blok=16", "--set"),
            parse_override("torch_compile_config.enable_inductor=true", "--set"),
            Override("max_batch_size", "0", "environment MAX_BATCH_SIZE"),
            Override("max_batch_size", True, "--max-batch-size"),
        ),
    )


@pytest.mark.parametrize("text", ["max_batch_size", "=4", ""])
def test_an_override_without_key_and_value_says_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--set: must be KEY=VALUE"):
        parse_override(text, "--set")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kv_cache_config: 5", "'kv_cache_config' is a section, not a value"),
        ("kv_cache_config:", "section 'kv_cache_config' is empty"),
        ("max_batch_size: [1]", "'max_batch_size' must be a whole number, not a list"),
        ("max_batch_size: {a: 1}", "'max_batch_size' must be a whole number, not a section"),
        ("max_batch_size: 99999999999999999999", "is too large"),
        ("max_batch_size: .inf", "must be a whole number, not '.inf'"),
        ("max_batch_size: 8.0", "must be a whole number, not 8.0"),
        ("max_batch_size: true", "must be a whole number, not true"),
        ("torch_compile_config: null", "does not honour 'torch_compile_config'"),
        ("cp_config: {cp_type: x}", "does not honour 'cp_config'"),
        ("lora_config: {lora_dir: x}", "'lora_config.lora_dir'"),
        ("max_batch: 1", "unknown key 'max_batch'\n  did you mean 'max_batch_size'?"),
    ],
)
def test_a_wrong_value_or_key_is_refused(in_tmp: Path, text: str, message: str) -> None:
    said = problems(write(in_tmp, text))
    assert said.startswith("engine.yaml:1: ")
    assert message in said


def test_param_names_the_first_key_at_fault(in_tmp: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(in_tmp, "dtype: 3\nmax_batch_size: x"))
    assert caught.value.param == "dtype"


def test_show_config_lists_key_value_and_source(in_tmp: Path, golden: Golden) -> None:
    path = write(in_tmp, "kv_cache_config:\n  tokens_per_block: 64\nenable_chunked_prefill: off\n")
    overrides = [
        Override("max_batch_size", "8", "environment MAX_BATCH_SIZE"),
        parse_override("kv_cache_config.free_gpu_memory_fraction=5e-1", "--set"),
    ]
    config = load_engine_config("torch", KEYS, path, overrides)
    golden("config/show_config.txt", show_config(config))


VALUES = st.integers(1, 4096)


@given(
    in_yaml=st.none() | VALUES,
    overrides=st.lists(st.tuples(st.booleans(), VALUES), max_size=5),
)
def test_flag_beats_environment_beats_yaml_beats_default_in_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    in_yaml: int | None,
    overrides: list[tuple[bool, int]],
) -> None:
    folder = tmp_path_factory.mktemp("layers")
    path = None if in_yaml is None else write(folder, f"max_batch_size: {in_yaml}")
    given_overrides = [
        Override("max_batch_size", str(value), "--set" if is_flag else "environment X")
        for is_flag, value in overrides
    ]
    flags = [value for is_flag, value in overrides if is_flag]
    variables = [value for is_flag, value in overrides if not is_flag]
    value, source = load(path, *given_overrides)["max_batch_size"]
    if flags:
        assert (value, source) == (flags[-1], "--set")
    elif variables:
        assert (value, source) == (variables[-1], "environment X")
    elif in_yaml is not None:
        assert value == in_yaml
        assert source.endswith("engine.yaml:1")
    else:
        assert (value, source) == (16, "default")


def test_how_tensorrt_llm_works_means_nothing_to_other_engines(in_tmp: Path) -> None:
    path = write(
        in_tmp, "cuda_graph_config: {enable_padding: true}\ndisable_overlap_scheduler: true\n"
    )
    override = parse_override("moe_config.backend=WIDEEP", "--set")
    config = load_engine_config("torch", KEYS, path, [override])
    assert config.without_effect == (
        "cuda_graph_config (engine.yaml:1)",
        "disable_overlap_scheduler (engine.yaml:2)",
        "moe_config.backend (--set)",
    )


def test_a_typing_mistake_is_found_also_where_keys_mean_nothing(in_tmp: Path) -> None:
    said = problems(write(in_tmp, "cuda_graph_config:\n  enable_graph_padding: true\n"))
    assert "engine.yaml:2: unknown key 'cuda_graph_config.enable_graph_padding'" in said

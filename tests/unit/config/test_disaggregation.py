"""Options of a disaggregated run, and what its two engine configs must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.config.disaggregation import require_same_blocks
from trtllm_workers.config.engine_config import load_engine_config, parse_override
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.options import LAUNCH_OPTIONS
from trtllm_workers.config.settings import Settings, resolve
from trtllm_workers.engines.registry import engine_keys
from trtllm_workers.errors import ConfigError
from trtllm_workers.transfer.registry import AUTO, TRANSPORTS
from trtllm_workers.types import Strategy

OPTIONS = {option.name: option for option in LAUNCH_OPTIONS}
DISAGGREGATED = {"disaggregated": True}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def settle(model: Path, explicit: Mapping[str, Any] = DISAGGREGATED, **environ: str) -> Settings:
    return resolve(explicit, {"HOME": "/home/me", **environ}, demo=(model, "demo"))


def refused(model: Path, explicit: Mapping[str, Any] = DISAGGREGATED, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settle(model, explicit, **environ)
    return str(caught.value)


def test_choices_are_those_of_the_types_they_stand_for() -> None:
    assert OPTIONS["strategy"].choices == tuple(Strategy)
    assert set(OPTIONS["kv_transport"].choices) == {AUTO, *TRANSPORTS}


def test_disaggregated_run_has_defaults_for_everything(model: Path) -> None:
    settings = settle(model)
    assert settings.disaggregated
    assert (settings.strategy, settings.kv_transport) == ("decode_first", "ucx")
    assert (settings.num_prefill_workers, settings.num_decode_workers) == (1, 1)
    for path in (settings.prefill_engine_config, settings.decode_engine_config):
        assert path is not None
        assert path.is_file()
    assert settings.prefill_cuda_visible_devices is None
    assert settings.warnings == ()


def test_variables_of_the_wider_family_are_honoured(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    settings = settle(
        model,
        DISAGGREGATION_STRATEGY="prefill_first",
        PREFILL_ENGINE_ARGS="mine.yaml",
        DECODE_ENGINE_ARGS="mine.yaml",
        PREFILL_CUDA_VISIBLE_DEVICES="0, 1",
        DECODE_CUDA_VISIBLE_DEVICES="GPU-5e2b",
    )
    assert settings.strategy == "prefill_first"
    assert settings.prefill_engine_config == settings.decode_engine_config == Path("mine.yaml")
    assert settings.prefill_cuda_visible_devices == "0,1"
    assert settings.decode_cuda_visible_devices == "GPU-5e2b"
    assert settings.warnings == ()


def test_unknown_strategy_is_refused_with_both_names(model: Path) -> None:
    assert refused(model, DISAGGREGATION_STRATEGY="both") == (
        "environment DISAGGREGATION_STRATEGY: must be one of decode_first, prefill_first, not 'both'"
    )


@pytest.mark.parametrize("text", ["0,,1", ",", "0 1", "0,1,"])
def test_devices_have_commas_between(model: Path, text: str) -> None:
    said = refused(model, DECODE_CUDA_VISIBLE_DEVICES=text)
    assert said.startswith("environment DECODE_CUDA_VISIBLE_DEVICES: must be devices with commas")


def test_device_named_twice_is_refused(model: Path) -> None:
    said = refused(model, PREFILL_CUDA_VISIBLE_DEVICES="0,1,0")
    assert said == "environment PREFILL_CUDA_VISIBLE_DEVICES: names a device twice: '0,1,0'"


def test_longest_handoff_is_not_shorter_than_the_shortest(model: Path) -> None:
    assert refused(model, HANDOFF_MAX_TIMEOUT_S="2") == (
        "environment HANDOFF_MAX_TIMEOUT_S: must be --handoff-min-timeout-s (5) or more, not 2"
    )
    assert refused(model, {**DISAGGREGATED, "handoff_min_timeout_s": "200"}) == (
        "--handoff-min-timeout-s: must be --handoff-max-timeout-s (120) or less, not 200"
    )
    assert settle(model, HANDOFF_MIN_TIMEOUT_S="2", HANDOFF_MAX_TIMEOUT_S="2").warnings == ()


def test_engine_config_of_a_role_must_be_a_file(model: Path) -> None:
    assert refused(model, DECODE_ENGINE_ARGS="gone.yaml") == (
        "environment DECODE_ENGINE_ARGS: 'gone.yaml' does not exist"
    )
    assert "is a folder" in refused(model, PREFILL_ENGINE_ARGS=str(model))


def test_options_of_a_disaggregated_run_have_no_effect_without_it(model: Path) -> None:
    settings = settle(model, {"num_decode_workers": "2"}, PREFILL_ENGINE_ARGS="gone.yaml")
    assert settings.warnings == (
        "--num-decode-workers has no effect without --disaggregated",
        "environment PREFILL_ENGINE_ARGS has no effect without --disaggregated",
    )


def test_one_part_of_a_run_says_nothing_of_options_without_effect(model: Path) -> None:
    environ = {"HOME": "/home/me", "DISAGGREGATION_STRATEGY": "prefill_first"}
    settings = resolve({}, environ, demo=(model, "demo"), of_one_part=True)
    assert (settings.strategy, settings.warnings) == ("prefill_first", ())


def test_options_of_aggregated_workers_have_no_effect_in_a_disaggregated_run(model: Path) -> None:
    warnings = settle(model, AGG_ENGINE_ARGS="gone.yaml", NUM_WORKERS="2").warnings
    assert warnings == (
        "environment AGG_ENGINE_ARGS has no effect: the run is disaggregated; its roles have "
        "--prefill-engine-config and --decode-engine-config",
        "environment NUM_WORKERS has no effect: the run is disaggregated; its roles have "
        "--num-prefill-workers and --num-decode-workers",
    )


def config_of(folder: Path, name: str, text: str, *overrides: str) -> EngineConfig:
    path = folder / name
    path.write_text(text)
    given = [parse_override(one, "--set") for one in overrides]
    return load_engine_config("torch", engine_keys("torch"), path, given)


def test_configs_that_differ_in_blocks_are_refused_with_both_places(
    model: Path, tmp_path: Path
) -> None:
    prefill = config_of(tmp_path, "p.yaml", "kv_cache_config:\n  tokens_per_block: 32\n")
    decode = config_of(
        tmp_path, "d.yaml", "dtype: float32\nkv_cache_config:\n  tokens_per_block: 64\n"
    )
    with pytest.raises(ConfigError) as caught:
        require_same_blocks(prefill, decode)
    assert str(caught.value).splitlines() == [
        "prefill and decode workers exchange KV blocks byte for byte, but differ:",
        "kv_cache_config.tokens_per_block is 32 (p.yaml:2) for prefill and 64 (d.yaml:3) for decode",
        "dtype is auto (default) for prefill and float32 (d.yaml:1) for decode",
        "give both the same value; --set KEY=VALUE sets it for both",
    ]


def test_configs_that_differ_elsewhere_are_taken(model: Path, tmp_path: Path) -> None:
    prefill = config_of(tmp_path, "p.yaml", "max_batch_size: 8\n")
    decode = config_of(
        tmp_path, "d.yaml", "max_batch_size: 64\nkv_cache_config:\n  tokens_per_block: 32\n"
    )
    require_same_blocks(prefill, decode)
    both = "kv_cache_config.tokens_per_block=64"
    require_same_blocks(
        config_of(tmp_path, "p.yaml", "", both), config_of(tmp_path, "d.yaml", "", both)
    )


def test_a_prefill_queue_needs_decode_first_and_names_both(model: Path) -> None:
    text = refused(model, PREFILL_DISPATCH="queue", DISAGGREGATION_STRATEGY="prefill_first")
    assert "PREFILL_DISPATCH" in text
    assert "decode_first" in text
    assert "DISAGGREGATION_STRATEGY" in text
    assert settle(model, PREFILL_DISPATCH="queue").prefill_dispatch == "queue"


def test_a_queues_size_without_a_queue_is_warned_of(model: Path) -> None:
    warnings = settle(model, MAX_PREFILL_QUEUE_SIZE="3").warnings
    assert any("MAX_PREFILL_QUEUE_SIZE has no effect" in one for one in warnings)
    assert settle(model, MAX_PREFILL_QUEUE_SIZE="3", PREFILL_DISPATCH="queue").warnings == ()

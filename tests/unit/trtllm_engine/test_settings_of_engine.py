"""What the adapter makes of an engine config: what it can do, its limits, what a role cannot do without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trtllm_workers.config.hf_model import HfModel
from trtllm_workers.config.keys import EngineConfig, Setting
from trtllm_workers.engines.trtllm.settings import (
    Options,
    engine_info,
    read_options,
    require_role_settings,
    transfer_timeout_s,
)
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import EngineInfo, Role

MODEL = HfModel("m-1", 1000, 4096, (2,), frozenset({2}), {})
NATIVE: dict[str, Any] = {
    "cache_transceiver_config.backend": "UCX",
    "cache_transceiver_config.max_tokens_in_buffer": 2048,
    "cache_transceiver_config.kv_transfer_timeout_ms": 1500,
}


def config(**keys: Any) -> EngineConfig:
    given = {key.replace("__", "."): Setting(value, "test") for key, value in keys.items()}
    return EngineConfig("trtllm", given)


def info(role: Role = Role.AGGREGATED, num_blocks: int | None = None, **keys: Any) -> EngineInfo:
    return engine_info(
        config(**keys), Options(role=role), MODEL, Path("/m"), num_blocks=num_blocks, kv_wire="UCX"
    )


def test_what_the_config_leaves_open_is_tensorrt_llms() -> None:
    found = info()
    assert (found.block_size, found.max_batch_size, found.max_num_tokens) == (32, 2048, 8192)
    assert found.max_seq_len == 4096  # the model's
    assert found.kv_transport == "none"
    assert found.max_prompt_len == 0


def test_blocks_are_those_told_else_bounded_by_the_config() -> None:
    assert info(num_blocks=77).num_blocks == 77
    assert info(kv_cache_config__max_tokens=640).num_blocks == 20


def test_a_role_apart_moves_its_own_kv_and_its_buffer_bounds_prompts() -> None:
    found = info(Role.PREFILL, **NATIVE)
    assert (found.kv_transport, found.kv_wire) == ("engine-native", "UCX")
    assert found.max_prompt_len == 2048


def test_guided_decoding_needs_its_backend_and_logprobs_no_speculation() -> None:
    assert "guided" not in info().capabilities
    assert "guided" in info(guided_decoding_backend="xgrammar").capabilities
    assert "logprobs" in info().capabilities
    assert "logprobs" not in info(speculative_config__decoding_type="MTP").capabilities
    assert "logit_bias" not in info().capabilities


def test_the_transfer_s_time_limit_is_in_seconds() -> None:
    assert transfer_timeout_s(config(**NATIVE)) == 1.5
    assert transfer_timeout_s(config()) == 0.0


def test_options_of_the_launcher_are_read() -> None:
    found = read_options({"role": "decode", "loras": '{"a": "/x"}', "log": "/l", "log_begin": "7"})
    assert found == Options(Role.DECODE, {"a": Path("/x")}, Path("/l"), 7)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_role_apart_needs_a_transceiver(role: Role) -> None:
    with pytest.raises(ConfigError, match=r"cache_transceiver_config\.backend is not set"):
        require_role_settings(config(), Options(role=role))
    require_role_settings(config(**NATIVE), Options(role=role))


def test_adapters_need_enable_lora() -> None:
    options = Options(loras={"a": Path("/x")})
    with pytest.raises(ConfigError, match="enable_lora"):
        require_role_settings(config(), options)
    require_role_settings(config(enable_lora=True), options)

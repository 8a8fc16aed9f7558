"""What the launcher tells the adapter besides the engine config, and what it makes of both. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_workers.config.hf_model import HfModel
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.engines.trtllm.sampling import CAPABILITIES
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import EngineInfo, Role, VisionInfo

_TRANSCEIVER = "cache_transceiver_config"
# TensorRT-LLM's own, for what a config leaves open.
_MAX_BATCH_SIZE, _MAX_NUM_TOKENS, _TOKENS_PER_BLOCK = 2048, 8192, 32


@dataclass(frozen=True, slots=True)
class Options:
    """What stands in ``EngineOptions.extra``, typed.

    ``loras`` are adapter folders by name. ``log`` is the file that the launcher keeps of this process's
    output, and ``log_begin`` its length when the process started.
    """

    role: Role = Role.AGGREGATED
    loras: Mapping[str, Path] = field(default_factory=dict)
    log: Path | None = None
    log_begin: int = 0


def read_options(extra: Mapping[str, str]) -> Options:
    """Return the options of ``extra``."""
    adapters = json.loads(extra.get("loras", "{}"))
    return Options(
        role=Role(extra.get("role", Role.AGGREGATED)),
        loras={name: Path(folder) for name, folder in adapters.items()},
        log=Path(extra["log"]) if "log" in extra else None,
        log_begin=int(extra.get("log_begin", "0")),
    )


def transceiver_of(config: EngineConfig) -> str:
    """Return the transceiver backend that the config names, "" when it is off."""
    setting = config.settings.get(f"{_TRANSCEIVER}.backend")
    return str(setting.value) if setting is not None and setting.value else ""


def transfer_timeout_s(config: EngineConfig) -> float:
    """Return after how many seconds TensorRT-LLM gives up a KV transfer; 0: never."""
    setting = config.settings.get(f"{_TRANSCEIVER}.kv_transfer_timeout_ms")
    return setting.value / 1000 if setting is not None and setting.value else 0.0


def engine_info(
    config: EngineConfig,
    options: Options,
    model: HfModel,
    model_path: Path,
    *,
    num_blocks: int | None,
    kv_wire: str,
    vision: VisionInfo | None = None,
) -> EngineInfo:
    """Return what is known of a started engine.

    ``num_blocks`` as TensorRT-LLM's statistics tell, None when they do not: then the config's own
    bound, and without one as many as the largest batch of longest sequences would fill.
    """

    def value(key: str, default: Any) -> Any:
        setting = config.settings.get(key)
        return default if setting is None or setting.value is None else setting.value

    block_size = value("kv_cache_config.tokens_per_block", _TOKENS_PER_BLOCK)
    max_seq_len = value("max_seq_len", model.max_positions)
    max_batch_size = value("max_batch_size", _MAX_BATCH_SIZE)
    if num_blocks is None:
        tokens = value("kv_cache_config.max_tokens", max_batch_size * max_seq_len)
        num_blocks = max(1, tokens // block_size)
    native = options.role is not Role.AGGREGATED and transceiver_of(config)
    missing = set()
    if not value("guided_decoding_backend", None):
        missing.add("guided")
    if value("speculative_config.decoding_type", None):
        missing.add(
            "logprobs"
        )  # such a request crashes a worker that speculates (TensorRT-LLM #12546)
    return EngineInfo(
        engine="trtllm",
        model_path=str(model_path),
        model_id=model.config_id,
        block_size=block_size,
        num_blocks=num_blocks,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_num_tokens=value("max_num_tokens", _MAX_NUM_TOKENS),
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        capabilities=tuple(name for name in CAPABILITIES if name not in missing),
        kv_transport="engine-native" if native else "none",
        kv_wire=kv_wire,
        max_prompt_len=value(f"{_TRANSCEIVER}.max_tokens_in_buffer", 0) if native else 0,
        loras=tuple(options.loras),
        device="cuda",
        dtype=str(value("dtype", "auto")),
        tensor_parallel_size=value("tensor_parallel_size", 1),
        kv_events=bool(value("kv_cache_config.event_buffer_max_size", 0))
        and value("kv_cache_config.enable_block_reuse", True)
        and options.role is not Role.ENCODE,
        vision=vision,
    )


def require_role_settings(config: EngineConfig, options: Options) -> None:
    """Raise ConfigError for settings with which the role cannot work."""
    if options.role in (Role.PREFILL, Role.DECODE) and not transceiver_of(config):
        raise ConfigError(
            f"role {options.role} moves KV between workers, and {_TRANSCEIVER}.backend is not set; "
            "write backend: UCX or NIXL, or give --kv-transport",
            param=f"{_TRANSCEIVER}.backend",
        )
    setting = config.settings.get("enable_lora")
    if options.loras and not (setting is not None and setting.value):
        raise ConfigError(
            "--lora serves adapters, but enable_lora is not true in the engine config; "
            "add enable_lora: true (and a lora_config with its max_lora_rank)",
            param="lora",
        )

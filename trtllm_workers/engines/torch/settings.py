"""The engine-config keys the torch engine honours. Imports nothing heavy and reads no file."""

from __future__ import annotations

from collections.abc import Mapping

from trtllm_workers.config.keys import Key
from trtllm_workers.errors import ConfigError

KEYS: dict[str, Key] = {
    "backend": Key(
        str, "pytorch", "which TensorRT-LLM backend a config is for", choices=("pytorch",)
    ),
    "max_batch_size": Key(int, 256, "requests that run at once", minimum=1),
    "max_num_tokens": Key(int, 2048, "tokens one step computes: prefill and decode", minimum=1),
    "max_seq_len": Key(
        int,
        None,
        "prompt + output tokens of one request; null takes the model's max_position_embeddings",
        minimum=2,
        optional=True,
    ),
    "enable_chunked_prefill": Key(
        bool, True, "prefill a prompt in pieces; off, prompts over max_num_tokens are refused"
    ),
    "dtype": Key(
        str,
        "auto",
        "what weights and KV are computed in; auto takes the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    "tensor_parallel_size": Key(int, 1, "ranks that share the model", minimum=1),
    "pipeline_parallel_size": Key(int, 1, "stages of layers", minimum=1, maximum=1),
    "trust_remote_code": Key(
        bool,
        False,
        "run code from the model folder, which this engine never does",
        choices=(False,),
    ),
    # Powers of two, so that blocks end where the attention's key tiles end.
    "kv_cache_config.tokens_per_block": Key(
        int, 32, "tokens per KV block", choices=(8, 16, 32, 64, 128, 256)
    ),
    "kv_cache_config.max_tokens": Key(
        int,
        None,
        "tokens the KV pool holds; null takes what memory allows",
        minimum=1,
        optional=True,
    ),
    "kv_cache_config.free_gpu_memory_fraction": Key(
        float,
        0.9,
        "share of the GPU memory free after loading that the KV pool takes; unused on CPU",
        minimum=0.01,
        maximum=1.0,
    ),
    "kv_cache_config.enable_block_reuse": Key(
        bool, True, "keep blocks of finished requests and reuse them for equal prefixes"
    ),
    "kv_cache_config.dtype": Key(
        str, "auto", "what KV is stored in; auto is the model's", choices=("auto",)
    ),
}


def num_threads_of(extra: Mapping[str, str]) -> int | None:
    """Return the engine option ``num_threads``; None: what suits the model. Raises ConfigError."""
    asked = extra.get("num_threads")
    if asked is None:
        return None
    if not asked.isdecimal() or not int(asked):
        raise ConfigError(
            f"num_threads must be a positive whole number, not '{asked}'", param="num_threads"
        )
    return int(asked)

"""The engine-config keys the sim engine honours. Imports nothing heavy and reads no file."""

from __future__ import annotations

from trtllm_workers.config.keys import Key

KEYS: dict[str, Key] = {
    "max_batch_size": Key(int, 2048, "requests that run at once", minimum=1),
    "max_num_tokens": Key(int, 8192, "tokens one step computes: prefill and decode", minimum=1),
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
    "kv_cache_config.tokens_per_block": Key(
        int, 32, "tokens per KV block", minimum=1, maximum=4096
    ),
    # As many as a large GPU holds for an 8B model; only blocks that move between workers take memory.
    "kv_cache_config.max_tokens": Key(int, 1_048_576, "tokens the KV pool holds", minimum=1),
    "kv_cache_config.enable_block_reuse": Key(
        bool, True, "keep blocks of finished requests and reuse them for equal prefixes"
    ),
}

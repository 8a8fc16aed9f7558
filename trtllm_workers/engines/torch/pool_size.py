"""How many blocks the KV pool gets, and where its memory comes from. Knows no weights."""

from __future__ import annotations

from pathlib import Path

import torch

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.engines.torch.kv_memory import KvMemory, layout_of
from trtllm_workers.engines.torch.model_config import ModelConfig
from trtllm_workers.engines.torch.ranks import Ranks
from trtllm_workers.engines.torch.shared_pages import on_one_host, share_pages
from trtllm_workers.errors import ConfigError
from trtllm_workers.types import KvLayout

# On the CPU the pool shares memory with everything else on the host; its pages are touched only as
# tokens come.
CPU_POOL_SHARE = 0.3


def make_memory(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
    ranks: Ranks,
) -> KvMemory:
    """Return the pool's memory, of equally many blocks on every rank.

    Ranks on one host share it, so that its blocks are whole; elsewhere each has its own heads' part.
    """
    is_shared = ranks.size > 1 and device.type == "cpu" and on_one_host(ranks)
    own_heads = model_config.num_kv_heads // ranks.size
    block = block_layout(config, model_config, dtype)
    bytes_here = block.block_bytes // (1 if is_shared else ranks.size)
    num_blocks = min(
        ranks.gather(
            ranks.together(
                lambda: _num_blocks(config, block.block_size, bytes_here, device, max_seq_len)
            )
        )
    )
    pages = share_pages(ranks, (num_blocks + 1) * block.block_bytes) if is_shared else None
    return ranks.together(
        lambda: KvMemory(
            num_blocks,
            num_layers=model_config.num_layers,
            num_kv_heads=model_config.num_kv_heads if is_shared else own_heads,
            head_dim=model_config.head_dim,
            block_size=block.block_size,
            dtype=dtype,
            device=device,
            first_head=ranks.rank * own_heads if is_shared else 0,
            num_own_heads=own_heads,
            pages=pages,
        )
    )


def block_layout(config: EngineConfig, model_config: ModelConfig, dtype: torch.dtype) -> KvLayout:
    """Return how a block with the heads of all ranks lies in memory."""
    return layout_of(
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config["kv_cache_config.tokens_per_block"],
        dtype=dtype,
    )


def _num_blocks(
    config: EngineConfig,
    block_size: int,
    block_bytes: int,
    device: torch.device,
    max_seq_len: int,
) -> int:
    max_tokens: int | None = config["kv_cache_config.max_tokens"]
    if max_tokens is not None:
        return _explicit_blocks(config, max_tokens, block_size, block_bytes, device)
    wanted: int = config["max_batch_size"] * -(-max_seq_len // block_size)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        room = int(free * config["kv_cache_config.free_gpu_memory_fraction"])
    else:
        room = int(available_ram_bytes() * CPU_POOL_SHARE)
    return max(1, min(wanted, room // block_bytes - 1))


def _explicit_blocks(
    config: EngineConfig, max_tokens: int, block_size: int, block_bytes: int, device: torch.device
) -> int:
    key = "kv_cache_config.max_tokens"
    if max_tokens < block_size:
        raise ConfigError(
            f"{key} {max_tokens} ({config.source(key)}) is less than one block of {block_size} "
            "tokens (kv_cache_config.tokens_per_block); raise it",
            param=key,
        )
    num_blocks = max_tokens // block_size
    needed = (num_blocks + 1) * block_bytes
    on_cpu = device.type == "cpu"
    room = available_ram_bytes() if on_cpu else torch.cuda.mem_get_info(device)[0]
    if needed > room:
        raise ConfigError(
            f"{key} {max_tokens} ({config.source(key)}) asks for {needed / 2**30:.1f} GiB of KV, but "
            f"{room / 2**30:.1f} GiB are free on {device}; lower it",
            param=key,
        )
    return num_blocks


def available_ram_bytes() -> int:
    """Return what Linux says could be used without swapping, container limits included."""
    available = 1 << 62
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        if limit != "max":
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        pass
    return available if available < 1 << 62 else 4 << 30

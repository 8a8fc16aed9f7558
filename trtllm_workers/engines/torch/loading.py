"""From a model folder to a model and a KV pool ready to serve. Runs in the engine thread.

Decides device, dtype, kernels and the pool's size; says why in the log or in a ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.engines.torch.accept import CAPABILITIES
from trtllm_workers.engines.torch.attention import QUERY_TILE
from trtllm_workers.engines.torch.checkpoint import Checkpoint, model_id_of, weight_files
from trtllm_workers.engines.torch.huge_pages import HugePages
from trtllm_workers.engines.torch.invariance import ForwardCheck, products_are_invariant
from trtllm_workers.engines.torch.kv_memory import KvMemory
from trtllm_workers.engines.torch.linear import PackedLinear, can_pack
from trtllm_workers.engines.torch.model import Model
from trtllm_workers.engines.torch.model_config import ModelConfig, read_model_config
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.types import EngineInfo

log = get_logger(__name__)

# On the CPU the pool shares memory with everything else on the host; its pages are touched only as
# tokens come.
CPU_POOL_SHARE = 0.3
# Below this a model's products take microseconds, less than bringing threads together does; on a
# busy host waiting for a thread that has lost its core costs milliseconds each time. The number of
# threads changes no result.
_ONE_THREAD_BYTES = 16 << 20
# Collapsing copies; 0.4 GiB took a second. With glibc's tunable glibc.malloc.hugetlb=1 set when the
# process starts, weights lie on huge pages from the beginning and nothing is left to do.
_HUGE_PAGES_BUDGET_S = 1.0
_ALL_THREADS = torch.get_num_threads()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the engine thread steps with.

    ``deterministic``: rows do not depend on their batch. ``any_num_threads``: nor on the number of
    threads, so that it may change between steps.
    """

    model: Model
    memory: KvMemory
    info: EngineInfo
    deterministic: bool
    any_num_threads: bool


def load(
    folder: Path,
    config: EngineConfig,
    on_progress: Callable[[float], None],
    num_threads: int | None = None,
) -> Loaded:
    """Load a model folder. Raises ConfigError for what the operator can mend.

    Sets torch's thread count, for the process, to ``num_threads`` or what suits the model.
    """
    model_config = read_model_config(folder)
    weights_bytes = sum(path.stat().st_size for path in weight_files(folder))
    small = weights_bytes < _ONE_THREAD_BYTES
    torch.set_num_threads(num_threads or (1 if small else _ALL_THREADS))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(config, model_config, device)
    max_seq_len = _max_seq_len(config, model_config)
    model, deterministic = _load_model(
        folder, model_config, device, dtype, max_seq_len, config, on_progress, small=small
    )
    num_blocks = _num_blocks(config, model_config, dtype, device, max_seq_len)
    block_size: int = config["kv_cache_config.tokens_per_block"]
    memory = _memory(model_config, num_blocks, block_size, dtype, device)
    info = EngineInfo(
        engine="torch",
        model_path=str(folder),
        model_id=model_id_of(folder),
        block_size=block_size,
        num_blocks=num_blocks,
        max_seq_len=min(max_seq_len, num_blocks * block_size),
        max_batch_size=config["max_batch_size"],
        max_num_tokens=config["max_num_tokens"],
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        capabilities=CAPABILITIES,
        layout=memory.layout,
        device=str(device),
        dtype=memory.layout.dtype,
    )
    any_num_threads = ForwardCheck(model, block_size).threads_do_not_matter()
    log.info(
        "model loaded",
        model=info.model_id,
        device=info.device,
        dtype=info.dtype,
        packed=model.packed,
        deterministic=deterministic,
        num_blocks=num_blocks,
        block_size=block_size,
        pool_mib=(num_blocks * memory.layout.block_bytes) >> 20,
        num_threads=torch.get_num_threads(),
    )
    return Loaded(model, memory, info, deterministic, any_num_threads)


def _load_model(
    folder: Path,
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    max_seq_len: int,
    config: EngineConfig,
    on_progress: Callable[[float], None],
    *,
    small: bool,
) -> tuple[Model, bool]:
    """Load with the fastest kernels that keep rows apart; with slower ones if those do not."""
    for pack in (True, False):
        with Checkpoint(folder, dtype, on_progress) as checkpoint:
            model = Model(
                model_config,
                checkpoint,
                device=device,
                dtype=dtype,
                max_positions=max_seq_len,
                pack=pack,
            )
        if not small:
            _use_huge_pages(model)
        if products_are_invariant(model):
            break
        if pack and model.packed:
            log.warning("packed weights depend on the batch here; loading again without packing")
            continue
        break
    return model, _settle_attention(model, config["kv_cache_config.tokens_per_block"])


def _use_huge_pages(model: Model) -> None:
    pages = HugePages(_HUGE_PAGES_BUDGET_S)
    for linear in [model.head, *model.linears]:
        if isinstance(linear, PackedLinear):
            for address, num_bytes in linear.memory():
                pages.advise(address, num_bytes)
    log.debug("weights on huge pages", collapsed=pages.num_collapsed)


def _settle_attention(model: Model, block_size: int) -> bool:
    """Choose attention's row padding; return whether logits now depend on nothing but the prompt."""
    everything = QUERY_TILE * model.config.group
    for min_rows in (None, everything):
        model.min_rows = min_rows
        if ForwardCheck(model, block_size).is_invariant():
            return True
    model.min_rows = None
    log.warning(
        "greedy output may depend on batch mates here: no kernel tried keeps rows apart",
        device=str(model.device),
        dtype=str(model.dtype),
        torch=torch.__version__,
    )
    return False


def _dtype(config: EngineConfig, model_config: ModelConfig, device: torch.device) -> torch.dtype:
    asked: str = config["dtype"]
    name = model_config.dtype if asked == "auto" else asked
    if name not in _DTYPES:
        raise ConfigError(
            f"the checkpoint's dtype '{name}' is not supported; set 'dtype' to one of "
            f"{', '.join(_DTYPES)}",
            param="dtype",
        )
    dtype = _DTYPES[name]
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.bfloat16 if can_pack(device, torch.bfloat16) else torch.float32
        log.warning("float16 is slow on a CPU; computing in another dtype", dtype=str(dtype))
    return dtype


def _max_seq_len(config: EngineConfig, model_config: ModelConfig) -> int:
    limit = model_config.max_positions
    asked: int | None = config["max_seq_len"]
    if asked is not None and asked > limit:
        raise ConfigError(
            f"max_seq_len {asked} ({config.source('max_seq_len')}) is more than the model's "
            f"max_position_embeddings {limit}",
            param="max_seq_len",
        )
    return asked or limit


def _num_blocks(
    config: EngineConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
) -> int:
    block_size: int = config["kv_cache_config.tokens_per_block"]
    block_bytes = (
        model_config.num_layers
        * 2
        * model_config.num_kv_heads
        * model_config.head_dim
        * block_size
        * dtype.itemsize
    )
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


def _memory(
    model_config: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KvMemory:
    return KvMemory(
        num_blocks,
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=block_size,
        dtype=dtype,
        device=device,
    )

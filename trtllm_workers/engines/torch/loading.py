"""From a model folder to a model and a KV pool ready to serve. Runs in the engine thread.

Decides device, dtype, kernels and the pool's size; says why in the log or in a ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.media import MediaSettings
from trtllm_workers.engines.torch.accept import CAPABILITIES
from trtllm_workers.engines.torch.attention import QUERY_TILE
from trtllm_workers.engines.torch.checkpoint import Checkpoint, model_id_of, weight_files
from trtllm_workers.engines.torch.huge_pages import HugePages
from trtllm_workers.engines.torch.invariance import ForwardCheck, products_are_invariant
from trtllm_workers.engines.torch.kv_memory import KvMemory
from trtllm_workers.engines.torch.linear import PackedLinear, can_pack
from trtllm_workers.engines.torch.model import Model
from trtllm_workers.engines.torch.model_config import ModelConfig, read_model_config
from trtllm_workers.engines.torch.pool_size import block_layout, make_memory
from trtllm_workers.engines.torch.ranks import ALONE, Ranks
from trtllm_workers.engines.torch.tensor_parallel import check_divisible
from trtllm_workers.engines.torch.vision.loading import Vision, load_encoder, make_vision
from trtllm_workers.errors import ConfigError
from trtllm_workers.observe.logs import get_logger
from trtllm_workers.transfer.base import KvPool
from trtllm_workers.types import EngineInfo

log = get_logger(__name__)

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
    threads, so that it may change between steps. ``vision`` is what it takes images with; None: text only.
    """

    model: Model
    memory: KvMemory
    info: EngineInfo
    deterministic: bool
    any_num_threads: bool
    vision: Vision | None = None

    @property
    def media_rows(self) -> torch.Tensor | None:
        """The rows of all images that are here; None: text only."""
        return None if self.vision is None else self.vision.rows

    def kv_pool(self) -> KvPool | None:
        """Return the blocks as transports see them; None where not all of them are in host memory."""
        return self.memory.kv_pool() if self.memory.layout == self.info.layout else None


def load(
    folder: Path,
    config: EngineConfig,
    on_progress: Callable[[float], None],
    num_threads: int | None = None,
    ranks: Ranks = ALONE,
    *,
    media: MediaSettings | None = None,
    encodes: bool = True,
) -> Loaded:
    """Load a model folder, or one rank's part of it; all ranks call it at the same time.

    Of a model that takes images the vision tower too, unless it need not encode.

    Raises ConfigError, on every rank, for what the operator can mend. Sets torch's thread count, for
    the process, to ``num_threads`` or what suits the model.
    """
    plan = ranks.together(lambda: make_plan(folder, config, ranks))
    _check_alike(plan, config, ranks)
    torch.set_num_threads(num_threads or (1 if plan.is_small else _ALL_THREADS))
    progress = _Progress(on_progress)
    model, deterministic = _load_model(folder, plan, config, progress, ranks)
    vision = load_vision(folder, plan, media or MediaSettings(), encodes, progress)
    memory = make_memory(
        config, plan.model_config, plan.dtype, plan.device, plan.max_seq_len, ranks
    )
    layout = block_layout(config, plan.model_config, plan.dtype)
    info = EngineInfo(
        kv_events=True,
        engine="torch",
        model_path=str(folder),
        model_id=plan.model_id,
        block_size=memory.block_size,
        num_blocks=memory.num_blocks,
        max_seq_len=min(plan.max_seq_len, memory.num_blocks * memory.block_size),
        max_batch_size=config["max_batch_size"],
        max_num_tokens=config["max_num_tokens"],
        vocab_size=plan.model_config.vocab_size,
        eos_token_ids=plan.model_config.eos_token_ids,
        capabilities=CAPABILITIES,
        layout=layout,
        device=str(plan.device),
        dtype=layout.dtype,
        tensor_parallel_size=ranks.size,
        vision=None if vision is None else vision.info,
    )
    any_num_threads = ranks.all(ForwardCheck(model, memory.block_size).threads_do_not_matter())
    loaded = Loaded(model, memory, info, deterministic, any_num_threads, vision)
    log.info(
        "model loaded",
        model=info.model_id,
        device=info.device,
        dtype=info.dtype,
        packed=model.packed,
        deterministic=deterministic,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        pool_mib=(info.num_blocks * memory.layout.block_bytes) >> 20,
        num_threads=torch.get_num_threads(),
        rank=ranks.rank,
        num_ranks=ranks.size,
        encodes=vision is not None and vision.info.encodes,
    )
    if loaded.kv_pool() is None:
        log.info("KV blocks cannot be moved by a transport", reason=_why_no_pool(plan.device))
    return loaded


class _Progress:
    """Shares of one checkpoint that is read in several goes: each begins where the last one ended."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._before = self._last = 0.0

    def __call__(self, share: float) -> None:
        """Tell the share of this go and all before it."""
        self._last = share
        self._tell(min(1.0, self._before + share))

    def next_go(self) -> None:
        """Count on from here."""
        self._before += self._last


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rank wants to load, before it reads a weight."""

    model_config: ModelConfig
    model_id: str
    device: torch.device
    dtype: torch.dtype
    can_pack: bool
    max_seq_len: int
    is_small: bool


def make_plan(folder: Path, config: EngineConfig, ranks: Ranks) -> Plan:
    """Read the folder's config files. Raises ConfigError for a model that cannot be served so."""
    model_config = read_model_config(folder)
    if model_config.vision is not None and ranks.size > 1:
        raise ConfigError(
            f"{folder}: a model of images and text runs on one rank of the torch engine; set "
            f"tensor_parallel_size to 1 ({config.source('tensor_parallel_size')} says {ranks.size})",
            param="tensor_parallel_size",
        )
    check_divisible(model_config, ranks.size, config.source("tensor_parallel_size"), folder)
    weights_bytes = sum(path.stat().st_size for path in weight_files(folder)) // ranks.size
    device = _device(ranks)
    dtype = _dtype(config, model_config, device)
    return Plan(
        model_config=model_config,
        model_id=model_id_of(folder),
        device=device,
        dtype=dtype,
        can_pack=can_pack(device, dtype),
        max_seq_len=_max_seq_len(config, model_config),
        is_small=weights_bytes < _ONE_THREAD_BYTES,
    )


def load_vision(
    folder: Path,
    plan: Plan,
    media: MediaSettings,
    encodes: bool,
    on_progress: Callable[[float], None],
) -> Vision | None:
    """Return what images are taken with; None for a model of text alone."""
    model = plan.model_config.vision
    if model is None:
        return None
    encoder = None
    if encodes:
        if isinstance(on_progress, _Progress):
            on_progress.next_go()
        encoder = load_encoder(
            folder,
            model,
            model_id=plan.model_id,
            device=plan.device,
            dtype=plan.dtype,
            on_progress=on_progress,
        )
    return make_vision(model, plan.dtype, media.cache_bytes, encoder)


def _check_alike(plan: Plan, config: EngineConfig, ranks: Ranks) -> None:
    """Raise ConfigError, on every rank, where ranks would compute different things."""
    ours = {
        "model": plan.model_id,
        "device": plan.device.type,
        "dtype": str(plan.dtype),
        "packed": str(plan.can_pack),
        **{key: repr(setting.value) for key, setting in config.settings.items()},
    }
    everybody = ranks.gather(ours)
    for rank, theirs in enumerate(everybody):
        for name, value in everybody[0].items():
            if theirs.get(name) != value:
                raise ConfigError(
                    f"the ranks of this worker differ: {name} is {value} on rank 0 and "
                    f"{theirs.get(name)} on rank {rank}; all need equal model folders, engine configs "
                    "and processors"
                )


def _device(ranks: Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.size == 1:
        return torch.device("cuda")
    return torch.device("cuda", ranks.rank % torch.cuda.device_count())


def _why_no_pool(device: torch.device) -> str:
    if device.type == "cuda":
        return "they are in device memory, which this engine does not export yet"
    return "the ranks of this worker are on several hosts, each with its own heads' part"


def _load_model(
    folder: Path,
    plan: Plan,
    config: EngineConfig,
    on_progress: Callable[[float], None],
    ranks: Ranks,
) -> tuple[Model, bool]:
    """Load with the fastest kernels that keep rows apart; with slower ones if those do not."""

    def read(pack: bool) -> Model:
        with Checkpoint(folder, plan.dtype, on_progress) as checkpoint:
            model = Model(
                plan.model_config,
                checkpoint,
                device=plan.device,
                dtype=plan.dtype,
                max_positions=plan.max_seq_len,
                pack=pack,
                ranks=ranks,
            )
        if not plan.is_small:
            _use_huge_pages(model)
        return model

    model = ranks.together(lambda: read(pack=True))
    if not ranks.all(products_are_invariant(model)) and plan.can_pack:
        log.warning("packed weights depend on the batch here; loading again without packing")
        model = ranks.together(lambda: read(pack=False))
    return model, _settle_attention(model, config["kv_cache_config.tokens_per_block"], ranks)


def _use_huge_pages(model: Model) -> None:
    pages = HugePages(_HUGE_PAGES_BUDGET_S)
    for linear in [model.head, *model.linears]:
        if isinstance(linear, PackedLinear):
            for address, num_bytes in linear.memory():
                pages.advise(address, num_bytes)
    log.debug("weights on huge pages", collapsed=pages.num_collapsed)


def _settle_attention(model: Model, block_size: int, ranks: Ranks) -> bool:
    """Choose attention's row padding; return whether logits now depend on nothing but the prompt."""
    everything = QUERY_TILE * model.config.group
    for min_rows in (None, everything):
        model.min_rows = min_rows
        if ranks.all(ForwardCheck(model, block_size).is_invariant()):
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

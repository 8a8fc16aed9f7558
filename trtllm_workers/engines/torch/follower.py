"""The life of a rank above 0: load its shard, step with rank 0, end with it."""

from __future__ import annotations

import torch

from trtllm_workers.engines.base import EngineOptions
from trtllm_workers.engines.torch.core import Core
from trtllm_workers.engines.torch.loading import load
from trtllm_workers.engines.torch.lockstep import Follower
from trtllm_workers.engines.torch.ranks import Ranks, join
from trtllm_workers.engines.torch.settings import num_threads_of
from trtllm_workers.engines.torch.threads import ThreadGovernor
from trtllm_workers.errors import LaunchError
from trtllm_workers.observe.logs import get_logger

log = get_logger(__name__)


def follow(options: EngineOptions) -> None:
    """See ``ranks.run_follower``."""
    ranks = join(options.config["tensor_parallel_size"])
    try:
        core = _load(options, ranks)
        if core is not None:
            _serve(core, ranks)
    except Exception:  # the process's border: the others must not wait for this rank
        log.error("a rank cannot go on; ending all of them", rank=ranks.rank, exc_info=True)
        ranks.abort()
        raise


def _load(options: EngineOptions, ranks: Ranks) -> Core[int] | None:
    config = options.config
    try:
        num_threads = ranks.together(lambda: num_threads_of(options.extra))
        loaded = load(options.model_path, config, options.on_progress, num_threads, ranks)
    except LaunchError as error:
        log.debug("a rank could not start", rank=ranks.rank, error=str(error))  # rank 0 reports it
        return None
    return Core(
        loaded,
        chunked_prefill=config["enable_chunked_prefill"],
        reuse=config["kv_cache_config.enable_block_reuse"],
    )


def _serve(core: Core[int], ranks: Ranks) -> None:
    follower = Follower(ranks, core)
    num_threads = torch.get_num_threads() if core.loaded.any_num_threads else 1
    governor = ThreadGovernor(num_threads, torch.set_num_threads)
    while follower.prepare():
        governor.before_step()
        follower.step()
        governor.after_step()

"""A worker of several ranks: which rank this process is, and what the ranks beside the leader do."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings


def rank_in_world(config: EngineConfig) -> int:
    """Return this process's rank; 0 serves, and is all there is without tensor parallelism.

    Raises ConfigError when MPI is missing, or when the world has another size than the config says.
    """
    ranks = config.settings.get("tensor_parallel_size")
    if ranks is None or ranks.value == 1:
        return 0
    from trtllm_workers.engines.torch.ranks import join

    return join(ranks.value).rank


def follow(settings: Settings, config: EngineConfig, extra: Mapping[str, str]) -> None:
    """Compute this rank's part of every step until the leader ends.

    mpiexec passes TERM and INT on to every rank. The leader drains then, and needs the others to the
    end; so a rank heeds TERM only when it comes because mpiexec itself is gone.
    """
    parent = os.getppid()

    def heed(number: int, _frame: object) -> None:
        if os.getppid() != parent:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, heed)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from trtllm_workers.engines.base import EngineOptions
    from trtllm_workers.engines.torch.ranks import run_follower

    run_follower(EngineOptions(model_path=settings.model_path, config=config, extra=extra))

"""A worker of several ranks: which rank this process is, and what the ranks beside the leader do."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from trtllm_workers.config.env import WORLD_SIZE, environment, mpi_size
from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings


def rank_in_world(config: EngineConfig) -> int:
    """Return this process's rank; 0 serves, and is all there is where nothing started several.

    Raises ConfigError when MPI is missing, when the world has another size than the config says, or
    when the ranks of a TensorRT-LLM worker see different environments.
    """
    if config.engine == "trtllm":
        return _rank_of_trtllm(config, environment())
    ranks = config.settings.get("tensor_parallel_size")
    if ranks is None or ranks.value == 1:
        return 0
    from trtllm_workers.engines.torch.ranks import join

    return join(ranks.value).rank


def _rank_of_trtllm(config: EngineConfig, environ: Mapping[str, str]) -> int:
    """TensorRT-LLM starts its ranks itself, unless an mpirun has done so."""
    told = environ.get(WORLD_SIZE, "")
    if not told.isdigit() and mpi_size(environ) == 1:
        return 0
    from trtllm_workers.deploy.mpi import world_of
    from trtllm_workers.worker.rank_env import join_world

    return join_world(environ, int(told) if told.isdigit() else world_of(config).size)


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
    if config.engine == "trtllm":
        from trtllm_workers.engines.trtllm import ranks

        ranks.run_follower()
        return
    from trtllm_workers.engines.base import EngineOptions
    from trtllm_workers.engines.torch.ranks import run_follower

    run_follower(EngineOptions(model_path=settings.model_path, config=config, extra=extra))

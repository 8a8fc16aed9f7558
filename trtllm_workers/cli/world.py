"""A worker of several ranks: which rank this process is, and what the ranks beside the leader do."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from trtllm_workers.config.keys import EngineConfig
from trtllm_workers.config.settings import Settings
from trtllm_workers.errors import ConfigError

_INSTALL = "pip install 'trtllm-launch[mpi]'"


def rank_in_world(config: EngineConfig) -> int:
    """Return this process's rank; 0 serves, and is all there is without tensor parallelism.

    Raises ConfigError when MPI is missing, or when the world has another size than the config says.
    """
    ranks = config.settings.get("tensor_parallel_size")
    if ranks is None or ranks.value == 1:
        return 0
    wanted = f"tensor_parallel_size {ranks.value} ({ranks.source})"
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as missing:  # RuntimeError: it finds no MPI library
        raise ConfigError(
            f"{wanted} needs MPI: {missing}; run: {_INSTALL}", param="tensor_parallel_size"
        ) from missing
    size: int = MPI.COMM_WORLD.Get_size()
    if size != ranks.value:
        raise ConfigError(
            f"{wanted} needs an MPI world of {ranks.value} ranks, but this process is in one of {size}; "
            f"'trtllm-launch up' starts it, or by hand: mpiexec -n {ranks.value} {sys.executable} "
            "-P -m mpi4py -m trtllm_workers.cli.main worker …",
            param="tensor_parallel_size",
        )
    rank: int = MPI.COMM_WORLD.Get_rank()
    return rank


def follow(settings: Settings, config: EngineConfig, extra: Mapping[str, str]) -> None:
    """Compute this rank's part of every step until the leader ends."""
    from trtllm_workers.engines.base import EngineOptions
    from trtllm_workers.engines.torch import ranks

    ranks.run_follower(EngineOptions(model_path=settings.model_path, config=config, extra=extra))

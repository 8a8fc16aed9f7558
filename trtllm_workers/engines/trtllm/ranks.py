"""What the ranks beside the leader of a TensorRT-LLM worker do: wait for tasks from rank 0."""

from __future__ import annotations

import runpy

from trtllm_workers.engines.trtllm.api import INSTALL
from trtllm_workers.errors import ConfigError

# TensorRT-LLM's own loop; rank 0's LLM sends its executors there over MPI.
_WORKER_NODE = "tensorrt_llm.llmapi.mgmn_worker_node"


def run_follower() -> None:
    """Serve tasks of rank 0 until it ends; for ranks above 0 of a world that an mpirun started.

    Raises ConfigError when TensorRT-LLM cannot be imported.
    """
    try:
        # Run rather than imported: the loop is the module's body.
        runpy.run_module(_WORKER_NODE, run_name="__main__")
    except ImportError as error:
        raise ConfigError(
            f"TensorRT-LLM does not import on this rank: {error}; {INSTALL}", param="engine"
        ) from error

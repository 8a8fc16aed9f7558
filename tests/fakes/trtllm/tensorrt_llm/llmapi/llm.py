"""The LLM class: checks its arguments, starts an executor, hands requests to it."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

from trtllm_workers.config.schema import trtllm_schema
from trtllm_workers.config.vision_model import read_vision

from ..executor.control import DIE_SEED, FAIL_SEED, WEDGE_SEED, Control
from ..executor.engine import Executor, Work
from ..executor.free import FreeExecutor
from ..executor.result import IterationResult, RequestOutput
from ..executor.utils import RequestError
from ..sampling_params import SamplingParams
from .disaggregated_params import DisaggregatedParams
from .worlds import World

_OWN = ("tokenizer", "_mpi_session", "backend", "model")
_BACKENDS = ("DEFAULT", "UCX", "NIXL", "MOONCAKE", "MPI")
_MARKERS = {
    "UCX": "UcxConnectionManager",
    "NIXL": "NixlTransferAgent",
    "MOONCAKE": "MooncakeTransferAgent",
    "MPI": "MpiConnectionManager",
}
_MOVERS = {"UCX": "ucx", "NIXL": "nixl"}
_PRIORITY = ("NIXL", "UCX", "MOONCAKE", "MPI")


class _Health:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def is_shutdown(self) -> bool:
        """Whether the executor has ended."""
        return self._llm._ended


class LLM:
    """Blocks until the engine is ready. Unknown arguments are refused."""

    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        del tokenizer, tokenizer_mode, trust_remote_code, dtype, revision, tokenizer_revision
        self._eyes: Any = None
        if not skip_tokenizer_init and read_vision(Path(model)) is not None:
            from ..inputs.eyes import Eyes  # imports torch

            self._eyes = Eyes(Path(model))
        self.args = kwargs
        check_arguments(kwargs)
        for name, value in (kwargs.get("env_overrides") or {}).items():
            os.environ[str(name)] = str(value)
        size = tensor_parallel_size * kwargs.get("pipeline_parallel_size", 1)
        size *= kwargs.get("context_parallel_size", 1)
        require_gpus(size, kwargs.get("gpus_per_node"))
        self.fake = Control()
        self._ended = False
        self._executor = _Health(self)
        self._numbers = itertools.count(1)
        self._begun = False
        self._stats, self._events = IterationResult(), IterationResult()
        self._kept: list[dict[str, Any]] = []
        self._chunked = bool(kwargs.get("enable_chunked_prefill", False))
        self._max_num_tokens = kwargs.get("max_num_tokens") or 8192
        backend = _transceiver(kwargs.get("cache_transceiver_config") or {})
        self._world = World(size)
        free = os.environ.get("FAKE_TRTLLM_ENGINE") == "free"
        mover = os.environ.get("FAKE_TRTLLM_TRANSPORT") or _MOVERS.get(backend, "")
        build: Any = FreeExecutor if free else Executor
        try:
            self._run: Any = build(
                Path(model),
                kwargs,
                self.fake,
                transport=mover if backend else "",
                on_stats=self._take_stats,
                on_events=self._events.put_from_thread,
            )
        except BaseException:
            self._world.shutdown()
            raise
        if backend:
            marker = os.environ.get("FAKE_TRTLLM_MARKER") or _MARKERS[backend]
            print(f"[TensorRT-LLM][INFO] {marker}::{marker} is up", file=sys.stdout, flush=True)
        print("Model init total -- 0.01s", flush=True)

    # --- requests ----------------------------------------------------------------------------------

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: DisaggregatedParams | None = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        """Return at once. Not a coroutine."""
        del prompt_adapter_request, kv_cache_retention_config, trace_headers, scheduling_params
        if self._ended or self.fake.death is not None:
            raise RuntimeError("LLM is shutting down")
        shown, prompt = self._process(inputs)
        sampling = sampling_params or SamplingParams()
        self.fake.seen.append(
            {
                "prompt": shown,
                "inputs": inputs,
                "sampling": sampling,
                "lora": lora_request,
                "streaming": streaming,
                "disaggregated_params": disaggregated_params,
                "cache_salt": cache_salt,
            }
        )
        kind = disaggregated_params.request_type if disaggregated_params else None
        if kind != "generation_only" and not self._chunked and len(prompt) > self._max_num_tokens:
            raise ValueError(
                f"prompt length {len(prompt)} is larger than max_num_tokens {self._max_num_tokens}"
            )
        if sampling.end_id is None:
            # The stand-in has no tokenizer at all; the real one would take the eos from its own.
            raise ValueError("end_id must be set without a tokenizer")
        if sampling.n != 1 or sampling.best_of not in (None, 1) or sampling.use_beam_search:
            raise ValueError("one answer per prompt here")
        if sampling.guided_decoding is not None and not self.args.get("guided_decoding_backend"):
            raise ValueError("guided decoding needs guided_decoding_backend")
        if lora_request is not None and not self.args.get("enable_lora"):
            raise ValueError("LoRA is not enabled")
        if max(prompt, default=0) >= self._run.vocab_size or not prompt:
            raise ValueError("Token ID out of vocab range")
        if kind == "context_only":
            sampling.max_tokens = 1
        salt = f"{cache_salt or ''}/{lora_request.lora_name}" if lora_request else cache_salt or ""
        number = next(self._numbers)
        output = RequestOutput(number, shown, self._run.abort)
        self._begun = True
        self._stats.mark_undone()
        self._events.mark_undone()
        work = Work(number, prompt, sampling, output, disaggregated_params, salt, shown)
        self._steer(work)
        self._run.add(work)
        return output

    def _process(self, inputs: Any) -> tuple[list[int], list[int]]:
        """Return a prompt's ids as they are told, and as they are computed."""
        if isinstance(inputs, str):
            inputs = {"prompt": inputs}
        if self._eyes is None or not isinstance(inputs, dict):
            ids = _token_ids(inputs)
            return ids, ids
        media = inputs.get("multi_modal_data") or inputs.get("multi_modal_embeddings")
        if not inputs.get("prompt"):
            if not media:
                ids = _token_ids(inputs)
                return ids, ids
            # Made text again, for the processor; embeddings are left out, and nobody says so.
            inputs = {
                "prompt": self._eyes.tokenizer.decode(inputs["prompt_token_ids"]),
                "multi_modal_data": inputs.get("multi_modal_data") or {},
            }
            if not inputs["multi_modal_data"]:
                del inputs["multi_modal_data"]
        shown, played = self._eyes.process(inputs, self._run.vocab_size)
        return list(shown), list(played)

    def _steer(self, work: Work) -> None:
        if os.environ.get("FAKE_TRTLLM_SEEDS") != "1":
            return
        seed = work.sampling.seed
        if seed == DIE_SEED:
            self.die(RuntimeError("CUDA error: an illegal memory access was encountered"))
        elif seed == WEDGE_SEED:
            self.fake.wedge()
        elif seed == FAIL_SEED:
            work.error = RequestError("this request was made to fail")

    def die(self, error: BaseException) -> None:
        """For tests: what is open raises this."""
        self.fake.die(error)
        self._run.call(self._run.kill)

    # --- statistics and events -----------------------------------------------------------------------

    def _take_stats(self, stats: list[dict[str, Any]]) -> None:
        self._kept = [*self._kept, *stats][-self.args.get("max_stats_len", 1000) :]
        self._stats.put_from_thread(stats)

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """Return the newest statistics; empty before the first prompt."""
        del timeout
        kept, self._kept = self._kept, []
        return kept

    def get_stats_async(self, timeout: float | None = 2) -> IterationResult:
        """Return the one result; before the first prompt it has nothing."""
        self._stats.set_timeout(timeout or 0)
        return self._stats

    def get_kv_cache_events_async(self, timeout: float | None = 2) -> IterationResult:
        """Return the one result. AssertionError before the first prompt."""
        assert self._begun, "the KV cache events start with the first prompt"
        self._events.set_timeout(timeout or 0)
        return self._events

    # --- the end ---------------------------------------------------------------------------------------

    def _check_health(self) -> bool:
        return not self._ended

    def shutdown(self) -> None:
        """End the executor and the other ranks; safe twice."""
        if self._ended:
            return
        self._ended = True
        self._run.shutdown()
        self._world.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.shutdown()


def _token_ids(inputs: Any) -> list[int]:
    if isinstance(inputs, dict):
        inputs = inputs.get("prompt_token_ids")
    if not isinstance(inputs, list) or not all(isinstance(one, int) for one in inputs):
        raise ValueError("without a tokenizer the prompt must be a list of token ids")
    return list(inputs)


def check_arguments(given: dict[str, Any], section: str = "") -> None:
    """Raise ValueError for what TorchLlmArgs does not know."""
    schema = trtllm_schema("1.2.1")
    for key, value in given.items():
        dotted = f"{section}.{key}" if section else key
        if not section and key in _OWN:
            continue
        if not schema.knows(dotted):
            raise ValueError(f"LLM got invalid argument: {dotted}")
        if key == "speculative_config" and isinstance(value, dict) and "decoding_type" in value:
            raise ValueError("speculative_config: decoding_type: Extra inputs are not permitted")
        if isinstance(value, dict) and dotted not in schema.free:
            check_arguments(value, dotted)
    if not section:
        backend = (given.get("cache_transceiver_config") or {}).get("backend")
        if backend is not None and backend not in _BACKENDS:
            raise ValueError(
                f"cache_transceiver_config.backend: Input should be one of {_BACKENDS}"
            )


def _transceiver(config: dict[str, Any]) -> str:
    """Return the transport that a config means; DEFAULT asks the variables, and is NIXL without them."""
    backend = config.get("backend") or ""
    if backend != "DEFAULT":
        return str(backend)
    for name in _PRIORITY:
        if os.environ.get(f"TRTLLM_USE_{name}_KVCACHE") == "1":
            return name
    return "NIXL"


def require_gpus(size: int, per_node: int | None) -> None:
    """Raise RuntimeError for fewer GPUs than ranks of this node."""
    if "FAKE_TRTLLM_NUM_GPUS" in os.environ:
        visible = int(os.environ["FAKE_TRTLLM_NUM_GPUS"])
    else:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        visible = len([one for one in named.split(",") if one])
    if visible < min(size, per_node or size):
        raise RuntimeError(f"Only {visible} GPUs are available, but {size} are required.")

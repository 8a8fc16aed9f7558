"""The names of TensorRT-LLM that the adapter uses, imported once. Nothing else imports the package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trtllm_workers.errors import ConfigError

INSTALL = (
    "run inside NVIDIA's container nvcr.io/nvidia/tensorrt-llm/release:1.2.1, or install it from "
    "NVIDIA's index: pip install tensorrt-llm==1.2.1 --extra-index-url https://pypi.nvidia.com"
)


@dataclass(frozen=True, slots=True)
class Api:
    """TensorRT-LLM's classes and functions.

    ``merge_options(args, options)`` is its own merge of YAML keys into LLM arguments: it knows which
    sections it has to dispatch. ``request_error`` is raised for one request; anything else is the engine's.
    """

    version: str
    llm: Callable[..., Any]
    sampling_params: Callable[..., Any]
    disaggregated_params: Callable[..., Any]
    guided_decoding_params: Callable[..., Any]
    lora_request: Callable[..., Any]
    merge_options: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
    request_error: type[Exception]


def load_api() -> Api:
    """Import TensorRT-LLM. Takes long, and starts MPI. Raises ConfigError when it cannot be imported."""
    try:
        package = importlib.import_module("tensorrt_llm")
        llmapi = importlib.import_module("tensorrt_llm.llmapi")
        utils = importlib.import_module("tensorrt_llm.llmapi.llm_utils")
        request = importlib.import_module("tensorrt_llm.executor.request")
        errors = importlib.import_module("tensorrt_llm.executor.utils")
    except ModuleNotFoundError as missing:
        if missing.name == "tensorrt_llm":
            raise ConfigError(f"TensorRT-LLM is not installed; {INSTALL}", param="engine") from None
        raise ConfigError(
            f"TensorRT-LLM lacks the module '{missing.name}'; {INSTALL}", param="engine"
        ) from missing
    except ImportError as error:  # a library of CUDA or TensorRT that does not load
        raise ConfigError(
            f"TensorRT-LLM does not import: {error}; {INSTALL}", param="engine"
        ) from error
    return Api(
        version=str(package.__version__),
        llm=llmapi.LLM,
        sampling_params=llmapi.SamplingParams,
        disaggregated_params=llmapi.DisaggregatedParams,
        guided_decoding_params=llmapi.GuidedDecodingParams,
        lora_request=request.LoRARequest,
        merge_options=utils.update_llm_args_with_extra_dict,
        request_error=errors.RequestError,
    )

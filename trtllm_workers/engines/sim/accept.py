"""Which requests the simulator takes, and what it says to the others. Changes nothing."""

from __future__ import annotations

import math
from collections.abc import Container

from trtllm_workers.errors import ContextTooLong, NotSupported, RequestError
from trtllm_workers.types import EngineInfo, GenerateRequest, SamplingParams

# top_p is accepted because every load test sends it; made-up tokens have no probabilities to cut.
CAPABILITIES = (
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
)
_DEFAULTS = SamplingParams(max_tokens=1)
_REFUSED = tuple(
    (name, getattr(_DEFAULTS, name))
    for name in SamplingParams.__struct_fields__
    if name not in CAPABILITIES
)


def check_request(
    request: GenerateRequest, info: EngineInfo, *, chunked_prefill: bool, running: Container[str]
) -> None:
    """Raise RequestError, naming the field, for a request that cannot be honoured here."""
    sampling = request.sampling
    for name, default in _REFUSED:
        if getattr(sampling, name) != default:
            raise NotSupported(
                f"the sim engine makes tokens without a model and does not honour '{name}'; "
                f"leave it out or serve with another engine",
                param=name,
            )
    if request.lora:
        raise NotSupported("engine sim has no LoRA adapters", param="model")
    _check_sampling(sampling)
    _check_prompt(request.prompt_token_ids, info.vocab_size)
    _check_length(len(request.prompt_token_ids), sampling.max_tokens, info, chunked_prefill)
    if request.request_id in running:
        raise RequestError(
            f"request_id '{request.request_id}' is running already; ids must be unique",
            param="request_id",
        )


def _check_sampling(sampling: SamplingParams) -> None:
    if sampling.max_tokens < 1:
        raise _wrong("max_tokens", "1 or more", sampling.max_tokens)
    if not 0 <= sampling.temperature < math.inf:
        raise _wrong("temperature", "0 or more", sampling.temperature)
    if not 0 < sampling.top_p <= 1:
        raise _wrong("top_p", "over 0 and at most 1", sampling.top_p)
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        bounds = f"0 to max_tokens ({sampling.max_tokens})"
        raise _wrong("min_tokens", bounds, sampling.min_tokens)


def _check_prompt(tokens: list[int], vocab_size: int) -> None:
    if not tokens:
        raise RequestError("the prompt holds no token", param="prompt_token_ids")
    lowest, highest = min(tokens), max(tokens)
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise RequestError(
            f"prompt token id {outside} is outside the vocabulary (0 to {vocab_size - 1})",
            param="prompt_token_ids",
        )


def _check_length(
    prompt_len: int, max_tokens: int, info: EngineInfo, chunked_prefill: bool
) -> None:
    total = prompt_len + max_tokens
    pool_tokens = info.num_blocks * info.block_size
    limit, name = min((info.max_seq_len, "max_seq_len"), (pool_tokens, "tokens in the KV pool"))
    if total > limit:
        raise ContextTooLong(
            f"{prompt_len} prompt tokens + {max_tokens} max_tokens = {total}, "
            f"more than this engine's {limit} ({name}); shorten the prompt or lower max_tokens",
            param="max_tokens" if prompt_len < limit else "prompt_token_ids",
        )
    if not chunked_prefill and prompt_len > info.max_num_tokens:
        raise ContextTooLong(
            f"{prompt_len} prompt tokens do not fit one step of {info.max_num_tokens} "
            "(max_num_tokens) and enable_chunked_prefill is off",
            param="prompt_token_ids",
        )


def _wrong(name: str, allowed: str, value: float) -> RequestError:
    return RequestError(f"'{name}' must be {allowed}, not {value}", param=name)

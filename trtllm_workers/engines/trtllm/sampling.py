"""Our sampling parameters as TensorRT-LLM's. A value that is set is passed on; zero is a value."""

from __future__ import annotations

from typing import Any

from trtllm_workers.engines.trtllm.api import Api
from trtllm_workers.types import EngineInfo, GuidedDecoding, GuidedKind, SamplingParams

# logit_bias has no counterpart among the fields that are known of TensorRT-LLM 1.2.1.
_NOT_HONOURED = ("logit_bias",)
CAPABILITIES = tuple(name for name in SamplingParams.__struct_fields__ if name not in _NOT_HONOURED)

# TensorRT-LLM would take no eos of its own where the tokenizer is not loaded; this id no token has.
_NO_TOKEN = -1
_SEED_RANGE = 1 << 64
_DEFAULTS = SamplingParams(max_tokens=1)
# Neutral values are left out: passing them on may switch on slower code.
_PENALTIES = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def trtllm_sampling(api: Api, sampling: SamplingParams, info: EngineInfo) -> Any:
    """Return a fresh TensorRT-LLM SamplingParams; it changes them in place, so none is used twice."""
    arguments: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        # Unset ones would mean greedy to TensorRT-LLM, so these three are always said.
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "detokenize": False,
        "add_special_tokens": False,
    }
    if sampling.temperature == 0:
        arguments["top_k"] = 1  # greedy in every sampler, whatever it makes of a temperature of 0
    if sampling.seed is not None:
        arguments["seed"] = sampling.seed % _SEED_RANGE  # unsigned there
    for name in _PENALTIES:
        value = getattr(sampling, name)
        if value != getattr(_DEFAULTS, name):
            arguments[name] = value
    if sampling.min_tokens:
        arguments["min_tokens"] = sampling.min_tokens
    if sampling.logprobs is not None:
        arguments["logprobs"] = max(1, sampling.logprobs)
    if sampling.guided is not None:
        arguments["guided_decoding"] = _guided(api, sampling.guided)
    arguments |= _ends(sampling, info)
    return api.sampling_params(**arguments)


def stop_ids(sampling: SamplingParams, info: EngineInfo) -> frozenset[int]:
    """Return the ids that end an answer and are not part of it."""
    eos = () if sampling.ignore_eos else info.eos_token_ids
    return frozenset((*eos, *sampling.stop_token_ids))


def _ends(sampling: SamplingParams, info: EngineInfo) -> dict[str, Any]:
    """Return the ends: TensorRT-LLM takes one eos id, the others are stop ids like any."""
    eos, *more = info.eos_token_ids or (_NO_TOKEN,)
    ends: dict[str, Any] = {"end_id": eos, "pad_id": max(eos, 0)}
    stops = list(sampling.stop_token_ids)
    if sampling.ignore_eos:
        ends["ignore_eos"] = True
    else:
        stops += more
    if stops:
        ends["stop_token_ids"] = stops
    return ends


def _guided(api: Api, guided: GuidedDecoding) -> Any:
    match guided.kind:
        case GuidedKind.JSON_SCHEMA:
            return api.guided_decoding_params(json=guided.value)
        case GuidedKind.JSON_OBJECT:
            return api.guided_decoding_params(json_object=True)
        case GuidedKind.REGEX:
            return api.guided_decoding_params(regex=guided.value)
        case GuidedKind.GRAMMAR:
            return api.guided_decoding_params(grammar=guided.value)

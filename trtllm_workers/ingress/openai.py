"""What a request asks for, checked value by value. Knows no tokenizer, no worker and no HTTP.

A field is honoured, or it is refused by name; nothing is ignored in silence. Values that mean what
would happen anyway are accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import msgspec

from trtllm_workers.errors import NotSupported, RequestError
from trtllm_workers.ingress.guided import guided_of
from trtllm_workers.ingress.messages import as_messages
from trtllm_workers.ingress.parse import parse_body
from trtllm_workers.ingress.schema import ChatBody, Common, CompletionBody, ResponseFormat
from trtllm_workers.types import MediaReference, SamplingParams

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
_INT64 = 1 << 63
_INT32 = (1 << 31) - 1
# Odd and far from a power of two: the seeds of the n choices of one request stay distinct.
_SEED_STEP = 0x9E3779B97F4A7C15

_CHAT = msgspec.json.Decoder(ChatBody)
_COMPLETION = msgspec.json.Decoder(CompletionBody)

# Field → the values besides null that change nothing.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_options": ({},),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_CHAT_REFUSED = tuple(name for name in _NOT_HONOURED if name in ChatBody.__struct_fields__)
_chat_refused = attrgetter(*_CHAT_REFUSED)

# Field → lowest, highest, and the default, which needs no capability of a worker.
_RANGES = {
    "temperature": (0.0, 2.0, 1.0),
    "top_p": (0.0, 1.0, 1.0),
    "min_p": (0.0, 1.0, 0.0),
    "presence_penalty": (-2.0, 2.0, 0.0),
    "frequency_penalty": (-2.0, 2.0, 0.0),
}
_ranged = attrgetter(*_RANGES)


@dataclass(frozen=True, slots=True)
class Ask:
    """One checked request.

    ``messages`` for a chat, else ``prompts`` (texts or token ids). ``fields`` are the sampling
    fields that differ from their default; a worker must be capable of each. ``max_tokens`` None
    means what the context leaves. ``guided_by`` is the field that ``guided`` of ``fields`` came in.
    ``references`` are the images of the messages, in order.
    """

    chat: bool
    model: str
    messages: list[dict[str, Any]]
    prompts: Sequence[str | list[int]]
    fields: Mapping[str, Any]
    max_tokens: int | None
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    include_stop: bool
    skip_special_tokens: bool
    logprobs: int | None
    echo: bool
    cache_salt: str
    guided_by: str = ""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_variables: Mapping[str, Any] | None = None
    references: tuple[MediaReference, ...] = ()

    def client_field(self, name: str) -> str:
        """Return what the client calls a field that workers know by ``name``."""
        if name == "guided":
            return self.guided_by or name
        if name == "prompt_token_ids":
            return "messages" if self.chat else "prompt"
        if name == "media" and self.references:
            return self.references[0].param
        return name

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """Return the sampling parameters of the ``choice``-th answer to a prompt."""
        if self.seed is None:
            return SamplingParams(max_tokens=max_tokens, **self.fields)
        seed = self.seed if choice == 0 else (self.seed + choice * _SEED_STEP) % _INT64
        return SamplingParams(max_tokens=max_tokens, **{**self.fields, "seed": seed})


def parse_chat(body: bytes) -> Ask:
    """Check the body of a chat request. Raises RequestError naming the field."""
    ask = parse_body(body, _CHAT)
    _refuse_not_honoured(_CHAT_REFUSED, _chat_refused(ask))
    if ask.max_completion_tokens is not None:
        if ask.max_tokens not in (None, ask.max_completion_tokens):
            raise RequestError(
                f"max_tokens ({ask.max_tokens}) and max_completion_tokens "
                f"({ask.max_completion_tokens}) differ; send one of them",
                param="max_tokens",
            )
        _between("max_completion_tokens", ask.max_completion_tokens, 1, _INT32)
    logprobs = None
    if ask.logprobs:
        logprobs = 0 if ask.top_logprobs is None else ask.top_logprobs
        _between("top_logprobs", logprobs, 0, MAX_TOP_LOGPROBS)
    elif ask.top_logprobs is not None:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if ask.continue_final_message and ask.add_generation_prompt:
        raise RequestError(
            "continue_final_message goes on with the last message, add_generation_prompt begins a "
            "new one; set one of them",
            param="continue_final_message",
        )
    messages, references = as_messages(ask.messages)
    return Ask(
        chat=True,
        messages=messages,
        references=references,
        prompts=(),
        max_tokens=ask.max_tokens or ask.max_completion_tokens,
        logprobs=logprobs,
        echo=False,
        add_generation_prompt=not ask.continue_final_message
        and ask.add_generation_prompt is not False,
        continue_final_message=bool(ask.continue_final_message),
        template_variables=ask.chat_template_kwargs,
        **_common(ask, logprobs, ask.response_format),
    )


def parse_completion(body: bytes) -> Ask:
    """Check the body of a completions request. Raises RequestError naming the field."""
    ask = parse_body(body, _COMPLETION)
    _refuse_not_honoured(("suffix",), (ask.suffix,))
    if ask.logprobs is not None:
        _between("logprobs", ask.logprobs, 0, MAX_TOP_LOGPROBS)
        if ask.echo:
            raise NotSupported(
                "echo together with logprobs (logprobs of the prompt) is not supported",
                param="echo",
            )
    if ask.best_of is not None and ask.best_of != (ask.n or 1):
        raise NotSupported(
            f"best_of ({ask.best_of}) other than n ({ask.n or 1}) is not supported: answers are "
            "not ranked here",
            param="best_of",
        )
    prompts = _prompts(ask.prompt)
    common = _common(ask, ask.logprobs)
    if len(prompts) * common["n"] > MAX_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts × n {common['n']} are more than {MAX_CHOICES} answers",
            param="prompt",
        )
    return Ask(
        chat=False,
        messages=[],
        prompts=prompts,
        max_tokens=ask.max_tokens,
        logprobs=ask.logprobs,
        echo=bool(ask.echo),
        **common,
    )


def _prompts(prompt: str | list[str | int | list[int]]) -> Sequence[str | list[int]]:
    """Return the prompts: one text, texts, one list of ids, or lists of ids."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise RequestError("prompt is an empty list", param="prompt")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if kinds in ({str}, {list}):
        return cast("Sequence[str | list[int]]", prompt)
    raise RequestError("prompt mixes texts, token ids and lists of them", param="prompt")


def _common(
    ask: Common, logprobs: int | None, response_format: ResponseFormat | None = None
) -> dict[str, Any]:
    if not ask.model:
        raise RequestError("model is empty", param="model")
    stop = _stops(ask.stop)
    if ask.stream_options is not None and not ask.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    options = ask.stream_options
    if options is not None and options.include_obfuscation:
        raise NotSupported(
            "stream_options.include_obfuscation is not supported here",
            param="stream_options.include_obfuscation",
        )
    if ask.seed is not None:
        _between("seed", ask.seed, -_INT64, _INT64 - 1)
    n = 1 if ask.n is None else ask.n
    _between("n", n, 1, MAX_CHOICES)
    if ask.max_tokens is not None:
        _between("max_tokens", ask.max_tokens, 1, _INT32)
    fields = _sampling_fields(ask, logprobs)
    guided_by, guided = guided_of(ask, response_format)
    if guided is not None:
        fields["guided"] = guided
    return {
        "model": ask.model,
        "fields": fields,
        "n": n,
        "seed": ask.seed,
        "stop": stop,
        "stream": bool(ask.stream),
        "include_usage": bool(options is not None and options.include_usage),
        "include_stop": bool(ask.include_stop_str_in_output),
        "skip_special_tokens": ask.skip_special_tokens is not False,
        "cache_salt": ask.cache_salt or "",
        "guided_by": guided_by,
    }


def _sampling_fields(ask: Common, logprobs: int | None) -> dict[str, Any]:
    """Return the sampling fields that differ from SamplingParams' defaults, checked."""
    fields: dict[str, Any] = {}
    for (name, (low, high, default)), value in zip(_RANGES.items(), _ranged(ask), strict=True):
        if value is not None:
            _between(name, value, low, high)
            if value != default:
                fields[name] = value
    if ask.repetition_penalty is not None:
        penalty = ask.repetition_penalty
        if not (math.isfinite(penalty) and 0.0 < penalty <= 10.0):
            raise RequestError(
                f"repetition_penalty must be above 0 and at most 10, not {penalty:g}",
                param="repetition_penalty",
            )
        if penalty != 1.0:
            fields["repetition_penalty"] = penalty
    if ask.top_k is not None:
        _between("top_k", ask.top_k, -1, _INT32)
        if ask.top_k > 0:  # -1 is what other servers call off
            fields["top_k"] = ask.top_k
    if ask.min_tokens is not None:
        _between("min_tokens", ask.min_tokens, 0, _INT32)
        if ask.min_tokens:
            fields["min_tokens"] = ask.min_tokens
    if ask.seed is not None:
        fields["seed"] = ask.seed
    if ask.ignore_eos:
        fields["ignore_eos"] = True
    if logprobs is not None:
        fields["logprobs"] = logprobs
    if ask.stop_token_ids:
        if len(ask.stop_token_ids) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"stop_token_ids has more than {MAX_LOGIT_BIAS} entries", param="stop_token_ids"
            )
        fields["stop_token_ids"] = tuple(ask.stop_token_ids)
    if ask.logit_bias:
        fields["logit_bias"] = _logit_bias(ask.logit_bias)
    return fields


def _logit_bias(bias: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", param="logit_bias")
    pairs = []
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise RequestError(
                f"logit_bias: the key '{token[:40]}' is no token id", param="logit_bias"
            )
        _between(f"logit_bias.{token}", value, -100.0, 100.0)
        pairs.append((int(token), value))
    return tuple(pairs)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} strings; at most {MAX_STOPS}", param="stop")
    for text in stops:
        if not text:
            raise RequestError("stop holds an empty string", param="stop")
        if len(text) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop holds a string of more than {MAX_STOP_CHARACTERS} characters", param="stop"
            )
    return tuple(dict.fromkeys(stops))


def _between(name: str, value: float, low: float, high: float) -> None:
    # NaN compares false with everything, so it is refused here too.
    if not low <= value <= high:
        raise RequestError(
            f"{name} must be between {low:.17g} and {high:.17g}, not {value:.17g}", param=name
        )


def _refuse_not_honoured(names: Sequence[str], values: tuple[Any, ...]) -> None:
    if values.count(None) == len(values):
        return
    for name, value in zip(names, values, strict=True):
        harmless = _NOT_HONOURED[name]
        if value is not None and value not in harmless:
            raise NotSupported(
                f"'{name}' is not supported here; leave it out"
                + (f" or set it to {_spelled(harmless[0])}" if harmless else ""),
                param=name,
            )


def _spelled(value: Any) -> str:
    return msgspec.json.encode(value).decode()

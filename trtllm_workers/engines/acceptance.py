"""Which requests an engine takes, and what it says to the others. The same for every engine."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from trtllm_workers.errors import ContextTooLong, EngineError, NotSupported, RequestError
from trtllm_workers.transfer.media_store import Entry, MediaStore
from trtllm_workers.types import EngineInfo, GenerateRequest, SamplingParams, VisionInfo

_DEFAULTS = SamplingParams(max_tokens=1)
_FIELDS = SamplingParams.__struct_fields__


def check_filled(request: GenerateRequest, num_filled_blocks: int, block_size: int) -> None:
    """Raise EngineError when so many blocks leave no prompt token to compute."""
    most = (len(request.prompt_token_ids) - 1) // block_size
    if not 0 <= num_filled_blocks <= most:
        raise EngineError(
            f"request {request.request_id}: {num_filled_blocks} filled blocks of {block_size} tokens, "
            f"but the last of {len(request.prompt_token_ids)} prompt tokens must be computed: 0 to "
            f"{most} may be filled"
        )


def check_request(
    request: GenerateRequest, info: EngineInfo, *, chunked_prefill: bool, running: Container[str]
) -> None:
    """Raise RequestError, naming the field, for a request that this engine cannot honour.

    What it honours beyond the defaults is in ``info.capabilities`` and ``info.loras``; ``running`` holds
    the ids of requests that have not ended.
    """
    sampling = request.sampling
    for name in _FIELDS:
        if name not in info.capabilities and getattr(sampling, name) != getattr(_DEFAULTS, name):
            raise NotSupported(
                f"engine {info.engine} does not honour '{name}'; leave it out or serve with another "
                "engine",
                param=name,
            )
    if request.lora and request.lora not in info.loras:
        held = f"it holds {', '.join(info.loras)}" if info.loras else "it holds none"
        raise NotSupported(
            f"engine {info.engine} has no adapter '{request.lora}'; {held}", param="model"
        )
    _check_prompt(request.prompt_token_ids, info.vocab_size)
    check_media(request, info)
    _check_sampling(sampling, info.vocab_size)
    _check_length(len(request.prompt_token_ids), sampling.max_tokens, info, chunked_prefill)
    if request.request_id in running:
        raise RequestError(
            f"request_id '{request.request_id}' is running already; ids must be unique",
            param="request_id",
        )


def check_media(request: GenerateRequest, info: EngineInfo) -> None:
    """Raise RequestError unless images and the placeholder tokens of the prompt are each other's."""
    vision = info.vision
    if vision is None:
        if request.media:
            raise NotSupported(
                f"model {info.model_id} on engine {info.engine} takes text only; send no images",
                param="media",
            )
        return
    tokens, placeholder = request.prompt_token_ids, vision.image_token_id
    end = 0
    for number, item in enumerate(request.media):
        first, end_before = item.offset, end
        end = first + item.num_tokens
        if item.num_tokens < 1 or first < end_before or end > len(tokens):
            raise RequestError(
                f"image {number} takes {item.num_tokens} tokens from {first} on, which is not after the "
                f"image before it (to {end_before}) and inside the prompt's {len(tokens)}",
                param="media",
            )
        if any(token != placeholder for token in tokens[first:end]):
            raise RequestError(
                f"image {number} stands where the prompt has other tokens than placeholders "
                f"({placeholder})",
                param="media",
            )
        _check_kind(number, item.grid is not None, vision)
    if tokens.count(placeholder) != sum(item.num_tokens for item in request.media):
        raise RequestError(
            f"the prompt holds placeholder tokens ({placeholder}, {vision.placeholder!r}) that stand for "
            "no image; leave them out, they have no meaning of their own",
            param="prompt_token_ids",
        )


def _check_kind(number: int, has_grid: bool, vision: VisionInfo) -> None:
    if has_grid != vision.uses_grid:
        wrong = "no grid, which" if vision.uses_grid else "a grid, which no"
        raise RequestError(
            f"image {number} has {wrong} model of family {vision.family} uses", param="media"
        )


def pin_media(request: GenerateRequest, store: MediaStore | None) -> list[Entry]:
    """Pin the bytes of a request's images, in order. Raises EngineError, pinning none, if some are not here."""
    pinned: list[Entry] = []
    if not request.media:
        return pinned
    for number, item in enumerate(request.media):
        entry = None if store is None else store.pin(item.digest)
        if entry is None:
            unpin_media(store, pinned)
            raise EngineError(
                f"request {request.request_id}: the bytes of image {number} are not here; they must be "
                "fetched before the prompt is computed"
            )
        pinned.append(entry)
    return pinned


def unpin_media(store: MediaStore | None, entries: Sequence[Entry]) -> None:
    """Take the pins of ``pin_media`` back."""
    if store is not None:
        for entry in entries:
            store.unpin(entry)


def _check_prompt(tokens: Sequence[int], vocab_size: int) -> None:
    if not tokens:
        raise RequestError("the prompt holds no token", param="prompt_token_ids")
    lowest, highest = min(tokens), max(tokens)
    if lowest < 0 or highest >= vocab_size:
        outside = lowest if lowest < 0 else highest
        raise RequestError(
            f"prompt token id {outside} is outside the vocabulary (0 to {vocab_size - 1})",
            param="prompt_token_ids",
        )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    def require(good: bool, name: str, allowed: str) -> None:
        if not good:
            value = getattr(sampling, name)
            raise RequestError(f"'{name}' must be {allowed}, not {value}", param=name)

    # Comparisons are written so that NaN fails them.
    require(sampling.max_tokens >= 1, "max_tokens", "1 or more")
    require(0 <= sampling.temperature < math.inf, "temperature", "0 or more")
    require(0 < sampling.top_p <= 1, "top_p", "over 0 and at most 1")
    require(sampling.top_k >= 0, "top_k", "0 (off) or more")
    require(0 <= sampling.min_p <= 1, "min_p", "between 0 and 1")
    require(0 < sampling.repetition_penalty < math.inf, "repetition_penalty", "over 0")
    require(math.isfinite(sampling.presence_penalty), "presence_penalty", "a finite number")
    require(math.isfinite(sampling.frequency_penalty), "frequency_penalty", "a finite number")
    bounds = f"0 to max_tokens ({sampling.max_tokens})"
    require(0 <= sampling.min_tokens <= sampling.max_tokens, "min_tokens", bounds)
    bounds = f"0 to the vocabulary's {vocab_size}"
    require(0 <= (sampling.logprobs or 0) <= vocab_size, "logprobs", bounds)
    _check_ids(sampling.stop_token_ids, "stop_token_ids", vocab_size)
    _check_ids([token for token, _bias in sampling.logit_bias], "logit_bias", vocab_size)
    for token, bias in sampling.logit_bias:
        if math.isnan(bias) or bias == math.inf:
            raise RequestError(
                f"'logit_bias' of token {token} must be a number, not {bias}", param="logit_bias"
            )


def _check_ids(ids: Sequence[int], name: str, vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"'{name}': token id {token} is outside the vocabulary (0 to {vocab_size - 1})",
                param=name,
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
    if 0 < info.max_prompt_len < prompt_len:
        raise ContextTooLong(
            f"{prompt_len} prompt tokens are more than the {info.max_prompt_len} that the KV transfer "
            "takes at once (cache_transceiver_config.max_tokens_in_buffer)",
            param="prompt_token_ids",
        )

"""How TensorRT-LLM words what the torch engine made: responses, logprobs, blocks in events."""

from __future__ import annotations

from typing import Any

from trtllm_workers.types import GenerateRequest, TokenLogprob
from trtllm_workers.types import SamplingParams as OurSampling

from ..sampling_params import SamplingParams
from .result import Logprob, Response


def merged(responses: list[Response]) -> Response:
    if len(responses) == 1:
        return responses[0]
    last = responses[-1]
    logprobs = [one for each in responses for one in each.logprobs or ()]
    return Response(
        [token for each in responses for token in each.token_ids],
        last.finish_reason,
        last.stop_reason,
        logprobs or None,
        last.cached_tokens,
    )


def logprobs_of(given: tuple[TokenLogprob, ...] | None) -> list[dict[int, Logprob]] | None:
    if given is None:
        return None
    found = []
    for one in given:
        entry = {token: Logprob(value, rank) for rank, (token, value) in enumerate(one.top, 1)}
        entry.setdefault(one.token_id, Logprob(one.logprob, len(entry) + 1))
        found.append(entry)
    return found


def hash64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")


def block_of(name: int, tokens: tuple[int, ...]) -> dict[str, Any]:
    return {
        "type": "stored_block",
        "block_hash": name,
        "tokens": [
            {"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens
        ],
        "cache_level": 0,
        "priority": 35,
    }


def torch_request(
    name: str, prompt: list[int], salt: str, given: SamplingParams, max_tokens: int | None = None
) -> GenerateRequest:
    """Return a request as the torch engine takes it."""
    greedy = given.is_greedy
    stops = list(given.stop_token_ids or ())
    if not given.ignore_eos and given.end_id is not None and given.end_id >= 0:
        stops.append(given.end_id)
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=prompt,
        cache_salt=salt,
        sampling=OurSampling(
            max_tokens=max_tokens or given.max_tokens,
            temperature=0.0
            if greedy
            else (1.0 if given.temperature is None else given.temperature),
            top_p=1.0 if greedy or given.top_p is None else given.top_p,
            top_k=0 if greedy or given.top_k is None else given.top_k,
            min_p=given.min_p or 0.0,
            seed=None if given.seed is None else given.seed % (1 << 63),
            repetition_penalty=given.repetition_penalty or 1.0,
            presence_penalty=given.presence_penalty or 0.0,
            frequency_penalty=given.frequency_penalty or 0.0,
            stop_token_ids=tuple(stops),
            ignore_eos=True,  # the end id stands among the stop ids
            min_tokens=min(given.min_tokens or 0, given.max_tokens),
            logprobs=given.logprobs,
        ),
    )

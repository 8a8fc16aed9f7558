"""What the torch engine honours of a request, and what it takes from a prefill. Changes nothing."""

from __future__ import annotations

from trtllm_workers.errors import EngineError
from trtllm_workers.types import EngineInfo, GenerateRequest, SamplingParams, TokenChunk

CAPABILITIES = tuple(name for name in SamplingParams.__struct_fields__ if name != "guided")


def check_first(request: GenerateRequest, first: TokenChunk, info: EngineInfo) -> None:
    """Raise EngineError for a prefill's first chunk that no stream here could go on from."""
    if first.finish_reason is not None:
        return
    tokens, most = first.token_ids, request.sampling.max_tokens
    if not 0 < len(tokens) < most or not all(0 <= token < info.vocab_size for token in tokens):
        raise EngineError(
            f"request {request.request_id}: cannot go on after tokens {list(tokens[:8])} of a prefill; "
            f"an unfinished one brings 1 to {most - 1} of them, ids 0 to {info.vocab_size - 1}; "
            "do prefill and decode serve the same model?"
        )

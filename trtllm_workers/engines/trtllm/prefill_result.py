"""What a prefill's one answer means: the prompt goes on elsewhere, or it is complete. Pure."""

from __future__ import annotations

from typing import Any

from trtllm_workers.engines.trtllm.chunks import ChunkMaker
from trtllm_workers.engines.trtllm.handoff_state import encode_state
from trtllm_workers.engines.trtllm.sampling import stop_ids
from trtllm_workers.errors import EngineError
from trtllm_workers.types import EngineInfo, GenerateRequest, Prefilled, TokenChunk

# A context_only request is told to make one token, so both mean that there is more to come.
_GOES_ON = ("length", "not_finished")


class _Output:
    """A CompletionOutput with another finish reason: how a prefill ends is not how its answer ends."""

    __slots__ = ("finish_reason", "logprobs", "stop_reason", "token_ids")

    def __init__(self, output: Any, finish_reason: str) -> None:
        self.token_ids = output.token_ids
        self.logprobs = output.logprobs
        self.stop_reason = output.stop_reason
        self.finish_reason = finish_reason


def read_prefill(
    result: Any, request: GenerateRequest, info: EngineInfo, version: str, hold_s: float
) -> Prefilled:
    """Return what a prefill made. Without a finish reason in ``first`` its KV waits to be fetched.

    Raises EngineError when it should go on, but brought no state or token to go on from.
    """
    output = result.outputs[0]
    goes_on = output.finish_reason in _GOES_ON and request.sampling.max_tokens > 1
    finished = "length" if goes_on else output.finish_reason or "cancelled"
    maker = ChunkMaker(1, stop_ids(request.sampling, info), request.sampling.logprobs)
    chunk = maker.take(_Output(output, finished), result.cached_tokens or 0)
    assert chunk is not None, "an output with a finish reason gives a chunk"
    num_tokens = len(request.prompt_token_ids)
    if not goes_on:
        return Prefilled(first=chunk, num_tokens=num_tokens)
    params = output.disaggregated_params or result.disaggregated_params
    if params is None:
        raise EngineError(
            f"request {request.request_id}: TensorRT-LLM's prefill answered without a state to go on from; "
            "is cache_transceiver_config.backend set?"
        )
    state = encode_state(params, version)
    # The state's token counts: it is what decode begins with.
    tokens = tuple(params.first_gen_tokens)
    logprobs = chunk.logprobs if tokens == chunk.token_ids else None
    first = TokenChunk(tokens, None, chunk.cached_tokens, logprobs=logprobs)
    return Prefilled(first=first, num_tokens=num_tokens, opaque=state, hold_s=hold_s)

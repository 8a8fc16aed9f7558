"""What decode needs of a prefill, as bytes: TensorRT-LLM's DisaggregatedParams, safe to travel.

JSON with the opaque state in base64. The multimodal and mrope handles are CUDA IPC handles, which mean
nothing outside their node, so a prefill that has them is refused rather than sent without.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trtllm_workers.engines.trtllm.api import Api
from trtllm_workers.errors import EngineError

_HANDLES = (
    "multimodal_embedding_handles",
    "mrope_position_ids_handle",
    "mrope_position_deltas_handle",
)


class _State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The wire form. Encoded as JSON, where ``bytes`` become base64."""

    tensorrt_llm: str
    first_gen_tokens: list[int]
    ctx_request_id: int
    opaque_state: bytes
    draft_tokens: list[int] | None = None


_DECODER = msgspec.json.Decoder(_State)


def encode_state(params: Any, version: str) -> bytes:
    """Return the bytes of what a ``context_only`` request answered. Raises EngineError."""
    for name in _HANDLES:
        if getattr(params, name, None):
            raise EngineError(
                f"the prefill holds {name}, which only work on their own node; "
                "requests with images cannot be handed to another worker"
            )
    if params.ctx_request_id is None or not params.first_gen_tokens or not params.opaque_state:
        raise EngineError(
            "TensorRT-LLM's prefill gave no state to go on from; is cache_transceiver_config.backend "
            "set on the prefill worker?"
        )
    return msgspec.json.encode(
        _State(
            tensorrt_llm=version,
            first_gen_tokens=list(params.first_gen_tokens),
            ctx_request_id=params.ctx_request_id,
            opaque_state=bytes(params.opaque_state),
            draft_tokens=list(params.draft_tokens) if params.draft_tokens else None,
        )
    )


def decode_state(api: Api, opaque: bytes, first: tuple[int, ...]) -> Any:
    """Return the DisaggregatedParams of a ``generation_only`` request that goes on from ``opaque``.

    Raises EngineError for bytes that are none, of another TensorRT-LLM, or of another first token.
    """
    try:
        state = _DECODER.decode(opaque)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise EngineError(f"the prefill's state cannot be read: {error}") from error
    if state.tensorrt_llm != api.version:
        raise EngineError(
            f"the prefill worker runs TensorRT-LLM {state.tensorrt_llm}, this one {api.version}; "
            "their states do not fit each other"
        )
    if tuple(state.first_gen_tokens) != first:
        raise EngineError(
            f"the prefill's state begins with tokens {state.first_gen_tokens}, its answer with "
            f"{list(first)}"
        )
    return api.disaggregated_params(
        request_type="generation_only",
        first_gen_tokens=state.first_gen_tokens,
        ctx_request_id=state.ctx_request_id,
        opaque_state=state.opaque_state,
        draft_tokens=state.draft_tokens,
    )

"""What decode needs of a prefill, as bytes: TensorRT-LLM's DisaggregatedParams, safe to travel.

JSON with the opaque state in base64. The handles of positions in space (mrope) are CUDA IPC handles, which
mean nothing outside their node: they travel with the node's name, and are refused on another rather than
left out. Handles of embeddings stay behind: they are in the KV, and ``generation_only`` takes none.
"""

from __future__ import annotations

from typing import Any

import msgspec

from trtllm_workers.engines.trtllm.api import Api
from trtllm_workers.engines.trtllm.node import node_id
from trtllm_workers.errors import EngineError

_POSITIONS = ("mrope_position_ids_handle", "mrope_position_deltas_handle")


class _State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The wire form. Encoded as JSON, where ``bytes`` become base64.

    ``positions`` are the two mrope handles as msgpack, which keeps their bytes apart from text; they are
    good on ``node``.
    """

    tensorrt_llm: str
    first_gen_tokens: list[int]
    ctx_request_id: int
    opaque_state: bytes
    draft_tokens: list[int] | None = None
    node: str = ""
    positions: bytes = b""


_DECODER = msgspec.json.Decoder(_State)
_POSITIONS_DECODER = msgspec.msgpack.Decoder(dict[str, dict[str, Any]])


def encode_state(params: Any, version: str) -> bytes:
    """Return the bytes of what a ``context_only`` request answered. Raises EngineError."""
    positions = {name: getattr(params, name, None) or None for name in _POSITIONS}
    if len({handle is None for handle in positions.values()}) > 1:
        raise EngineError(
            f"TensorRT-LLM's prefill gave one of {' and '.join(_POSITIONS)}, and not the other"
        )
    if params.ctx_request_id is None or not params.first_gen_tokens or not params.opaque_state:
        raise EngineError(
            "TensorRT-LLM's prefill gave no state to go on from; is cache_transceiver_config.backend "
            "set on the prefill worker?"
        )
    held = any(positions.values())
    try:
        packed = msgspec.msgpack.encode(positions) if held else b""
    except TypeError as error:
        raise EngineError(
            f"TensorRT-LLM's prefill gave handles that cannot travel: {error}"
        ) from error
    return msgspec.json.encode(
        _State(
            tensorrt_llm=version,
            first_gen_tokens=list(params.first_gen_tokens),
            ctx_request_id=params.ctx_request_id,
            opaque_state=bytes(params.opaque_state),
            draft_tokens=list(params.draft_tokens) if params.draft_tokens else None,
            node=node_id() if held else "",
            positions=packed,
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
    if state.node and state.node != node_id():
        raise EngineError(
            "the prefill's positions in space (mrope) are handles that only work on its own node; put "
            "prefill and decode workers of this model on one node, or serve it aggregated"
        )
    try:
        held = _POSITIONS_DECODER.decode(state.positions) if state.node else {}
    except msgspec.DecodeError as error:
        raise EngineError(f"the prefill's positions cannot be read: {error}") from error
    return api.disaggregated_params(
        request_type="generation_only",
        first_gen_tokens=state.first_gen_tokens,
        ctx_request_id=state.ctx_request_id,
        opaque_state=state.opaque_state,
        draft_tokens=state.draft_tokens,
        **{name: handle for name, handle in held.items() if name in _POSITIONS},
    )

"""What each role does with a request of an ingress. Reads as the design does; knows no socket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import PeerLost, RequestError
from trtllm_workers.planes.base import RequestPlane
from trtllm_workers.planes.messages import Submit
from trtllm_workers.types import FinishReason, GenerateRequest, Role, TokenChunk
from trtllm_workers.worker.decode_desk import DecodeDesk
from trtllm_workers.worker.media_desk import MediaDesk
from trtllm_workers.worker.outbox import StreamOut
from trtllm_workers.worker.prefill_desk import PrefillDesk


@dataclass(frozen=True, slots=True)
class Desks:
    """What the roles work with. ``media``: None of an engine that takes text only."""

    engine: Engine
    plane: RequestPlane
    prefill: PrefillDesk
    decode: DecodeDesk | None
    media: MediaDesk | None = None


Handler = Callable[[Desks, Submit, GenerateRequest, StreamOut], None]


def aggregated(desks: Desks, _submit: Submit, request: GenerateRequest, out: StreamOut) -> None:
    """Prefill and decode here; tokens go straight to the ingress that asked."""
    if request.media and desks.media is not None:
        desks.media.when_here(
            request,
            begin=partial(desks.engine.submit, request, out),
            failed=lambda error: out.fail(error.code or "engine_error", str(error), error.param),
            aborted=lambda: out(TokenChunk((), FinishReason.ABORT)),
        )
        return
    desks.engine.submit(request, out)


def prefill(desks: Desks, submit: Submit, request: GenerateRequest, out: StreamOut) -> None:
    """Prefill here and hand over to the decode worker that the ingress chose (prefill_first)."""
    if submit.decode is None:
        raise RequestError("this worker has role prefill: it needs a decode worker to hand over to")
    peer = desks.plane.peer(submit.decode)
    if peer is None:  # decode workers connect to prefill workers, so this one is gone or new
        raise PeerLost(f"decode worker {submit.decode} is not connected to this prefill worker")
    desks.prefill.hand_over(peer, submit, request, out)


def decode(desks: Desks, submit: Submit, request: GenerateRequest, out: StreamOut) -> None:
    """Have the prompt computed by a prefill worker and decode here (decode_first)."""
    assert desks.decode is not None, "a decode worker has its desk"
    desks.decode.submit(request, out, submit.prefill)


def encode(_desks: Desks, _submit: Submit, _request: GenerateRequest, _out: StreamOut) -> None:
    """Refuse: this worker makes embeddings of images (``encode_desk.py``) and no tokens."""
    raise RequestError("this worker has role encode: it makes embeddings of images, and no answers")


ROLES: dict[Role, Handler] = {
    Role.AGGREGATED: aggregated,
    Role.PREFILL: prefill,
    Role.DECODE: decode,
    Role.ENCODE: encode,
}

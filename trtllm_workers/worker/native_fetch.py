"""Fetching KV with an engine that moves its own: it is told to go on, and its first chunk is the proof.

Here no block id is known and no byte is counted. The prefill worker hears that its KV was taken once the
first chunk is out; whether the KV was the right one is TensorRT-LLM's word, and the canary's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from trtllm_workers.engines.base import Engine
from trtllm_workers.errors import EngineError, TransferFailed
from trtllm_workers.planes.messages import Offer
from trtllm_workers.types import FinishReason, TokenChunk
from trtllm_workers.worker.handoff_job import TRANSFER, Aborted, Job, WentWrong, now_s

# The engine gives up by its own deadline; one that does not even say so is not waited for much longer.
_SILENCE_S = 10.0


async def fetch_natively(
    engine: Engine, job: Job, offer: Offer, timeout_s: float, begun: Callable[[float], None]
) -> None:
    """Let ``engine`` fetch what ``offer`` holds; return once the stream runs, its chunks going to ``job.out``.

    ``begun(seconds)`` is called with the duration of the transfer before the first chunk goes out. Raises
    WentWrong when the KV did not come (the request is still reserved), Aborted, and EngineError when the
    engine is silent beyond every deadline.
    """
    first: asyncio.Future[TokenChunk] = asyncio.get_running_loop().create_future()
    began_s = now_s()

    def deliver(chunk: TokenChunk) -> None:
        if first.cancelled():
            return  # the desk has given up, and says how the request ends
        if first.done():
            job.out(chunk)
            return
        first.set_result(chunk)
        if not _failed(chunk):
            begun(now_s() - began_s)
            job.out(chunk)

    try:
        engine.resume(
            job.request.request_id, offer.prefilled.first, deliver, offer.prefilled.opaque
        )
    except EngineError as error:
        raise WentWrong(TRANSFER, TransferFailed(str(error))) from error
    await asyncio.wait(
        (first, job.aborted),
        timeout=timeout_s + _SILENCE_S,
        return_when=asyncio.FIRST_COMPLETED,
    )
    if first.done():
        chunk = first.result()
        if _failed(chunk):
            raise WentWrong(TRANSFER, TransferFailed(chunk.error_message or "the KV did not come"))
        return
    first.cancel()
    if job.aborted.done():
        raise Aborted
    raise EngineError(
        f"handoff {job.handoff_id}: the engine said nothing for {timeout_s + _SILENCE_S:.0f} s, "
        "longer than its own transfer may take (cache_transceiver_config.kv_transfer_timeout_ms)"
    )


def _failed(chunk: TokenChunk) -> bool:
    return chunk.finish_reason is FinishReason.ERROR and chunk.error_code == TransferFailed.code

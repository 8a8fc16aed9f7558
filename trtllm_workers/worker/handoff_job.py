"""One request on its way into a decode worker's engine, as a value. Decides nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from trtllm_workers.errors import LaunchError
from trtllm_workers.planes.messages import Offer
from trtllm_workers.types import Address, FinishReason, GenerateRequest, Reservation, TokenChunk
from trtllm_workers.worker.pairs import Pair

T = TypeVar("T")

# What goes wrong on the way, as causes in metrics and logs.
NO_PREFILL, REFUSED, LOST = "no_prefill_worker", "prefill_refused", "prefill_lost"
QUEUE_FULL, QUEUE_AWAY = "queue_full", "queue_away"
PREFILL_TIMEOUT, EXPIRED, TRANSFER = "prefill_timeout", "handoff_expired", "transfer_failed"


class Out(Protocol):
    """Where a request's chunks go; ``on_first`` is called with the first of them."""

    on_first: Callable[[], None] | None

    def __call__(self, chunk: TokenChunk) -> None: ...


class Aborted(Exception):
    """The client does not want the request any more."""


class WentWrong(Exception):
    """The blocks do not come; ``cause`` is counted, ``error`` told."""

    def __init__(self, cause: str, error: LaunchError) -> None:
        super().__init__(str(error))
        self.cause = cause
        self.error = error


def _future() -> asyncio.Future[T]:
    return asyncio.get_running_loop().create_future()


@dataclass(slots=True, eq=False)
class Job:
    """One request until it is resumed.

    ``pair`` is set once a prefill worker is chosen. ``offer`` and ``released`` resolve with what that
    worker says, or with the error that makes it silent. ``probe``: no fallback, errors are raised.
    ``wish``: the prefill worker to ask, if it can be asked.
    ``streaming``: an engine that moves its own KV has begun to answer.
    """

    request: GenerateRequest
    out: Out
    handoff_id: str
    arrived_s: float
    pair: Pair | None = None
    handed_over: bool = False
    probe: bool = False
    wish: Address | None = None
    streaming: bool = False
    asked: bool = False
    offer: asyncio.Future[Offer | LaunchError] = field(default_factory=_future)
    released: asyncio.Future[bool | LaunchError] = field(default_factory=_future)
    reserved: asyncio.Future[Reservation] = field(default_factory=_future)
    aborted: asyncio.Future[None] = field(default_factory=_future)
    offered_s: float = 0.0


def settle(future: asyncio.Future[T], result: T) -> None:
    """Resolve a future, unless its owner has given up."""
    if not future.done():
        future.set_result(result)


def fail(job: Job, error: LaunchError) -> None:
    """End a request with an error."""
    job.out(
        TokenChunk(
            (),
            FinishReason.ERROR,
            error_code=error.code or "engine_error",
            error_message=str(error),
            error_param=error.param,
        )
    )


def handoff_key(pair: Pair, handoff_id: str) -> tuple[str, str, str]:
    """Return what tells a handoff from all others of this worker."""
    address = pair.record.address
    return address.peer_id, address.incarnation, handoff_id


def now_s() -> float:
    """Return the time in seconds; the loop's own clock may only count milliseconds."""
    return time.monotonic()

"""One accepted request on the loop's side: what it is for, and whom to tell. Knows no thread.

::

    submit ───────────────────────────────▶ STREAMING ──last chunk──▶ ended
    prefill ─▶ PREFILLING ──delivered─▶ PINNED ──release, abort──▶ ended
    reserve ─▶ RESERVING ──delivered─▶ RESERVED ──resume──▶ STREAMING
                                          ├──prefill_reserved──▶ PREFILLING
                                          └──abort──▶ ended

Nobody waits for word of a PINNED or RESERVED request, so its end is told to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

from trtllm_workers.engines.torch.core import Result
from trtllm_workers.engines.torch.sequence import Purpose
from trtllm_workers.transfer.media_store import Entry
from trtllm_workers.types import FinishReason, GenerateRequest, Prefilled, Reservation, TokenChunk


class Phase(Enum):
    """See the module."""

    STREAMING = auto()
    PREFILLING = auto()
    PINNED = auto()
    RESERVING = auto()
    RESERVED = auto()


_PHASES = {
    Purpose.GENERATE: Phase.STREAMING,
    Purpose.PREFILL: Phase.PREFILLING,
    Purpose.RESERVE: Phase.RESERVING,
}
HELD = (Phase.PINNED, Phase.RESERVED)


class Stream:
    """Compared by identity: request ids may come again; ``number`` does not.

    ``deliver`` takes what suits the phase. ``aborted``: what the engine thread had posted before it
    heard of the abort is dropped. ``pinned`` are its images, as far as it holds them in the media store.
    """

    __slots__ = (
        "aborted",
        "arrived_s",
        "deliver",
        "number",
        "phase",
        "pinned",
        "purpose",
        "request",
    )

    def __init__(
        self,
        request: GenerateRequest,
        deliver: Callable[[Any], None],
        purpose: Purpose = Purpose.GENERATE,
        number: int = 0,
    ) -> None:
        self.request = request
        self.deliver = deliver
        self.purpose = purpose
        self.number = number
        self.phase = _PHASES[purpose]
        self.arrived_s = time.monotonic()
        self.aborted = False
        self.pinned: Sequence[Entry] = ()

    def tell(self, result: Result) -> None:
        """Deliver a result in the form the caller waits for, and move on to the next phase."""
        phase = self.phase
        if phase in HELD:
            return
        if phase is Phase.PREFILLING:
            if isinstance(result, TokenChunk):
                result = Prefilled(first=result)
            self.phase = Phase.PINNED
        elif phase is Phase.RESERVING:
            if isinstance(result, TokenChunk):
                result = Reservation(ended=result)
            self.phase = Phase.RESERVED
        self.deliver(result)


def reason_of(result: Result) -> FinishReason | None:
    """Return why the request ended with this result; None when it did not."""
    if isinstance(result, Prefilled):
        return result.first.finish_reason
    if isinstance(result, Reservation):
        return None if result.ended is None else result.ended.finish_reason
    return result.finish_reason

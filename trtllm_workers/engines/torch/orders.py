"""What the engine's core can be told between two steps. Knows no thread and no loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from trtllm_workers.engines.torch.core import Core, Key
from trtllm_workers.engines.torch.sequence import Purpose, Rows
from trtllm_workers.types import GenerateRequest, TokenChunk


@dataclass(frozen=True, slots=True)
class Add(Generic[Key]):
    """Queue an accepted request; ``arrived_s`` is when it came, by ``time.monotonic``.

    ``rows`` are those of its images; so in the orders below.
    """

    key: Key
    request: GenerateRequest
    purpose: Purpose
    arrived_s: float
    rows: Rows = ()


@dataclass(frozen=True, slots=True)
class Abort(Generic[Key]):
    """End a request, whatever phase it is in."""

    key: Key


@dataclass(frozen=True, slots=True)
class Release(Generic[Key]):
    """Unpin a prefilled request."""

    key: Key


@dataclass(frozen=True, slots=True)
class Resume(Generic[Key]):
    """Go on with a reserved request; see ``Core.resume``."""

    key: Key
    first: TokenChunk | None
    rows: Rows = ()


@dataclass(frozen=True, slots=True)
class PrefillReserved(Generic[Key]):
    """Compute a reserved request's prompt; see ``Core.prefill_reserved``."""

    key: Key
    num_filled_blocks: int
    asked_s: float
    rows: Rows = ()


Order = Add[Key] | Abort[Key] | Release[Key] | Resume[Key] | PrefillReserved[Key]


def carry_out(core: Core[Key], order: Order[Key]) -> TokenChunk | None:
    """Do it; return the last chunk of a request that ended by it."""
    if isinstance(order, Add):
        core.add(order.key, order.request, order.purpose, order.arrived_s, order.rows)
    elif isinstance(order, Abort):
        return core.abort(order.key)
    elif isinstance(order, Release):
        core.release(order.key)
    elif isinstance(order, PrefillReserved):
        core.prefill_reserved(order.key, order.num_filled_blocks, order.asked_s, order.rows)
    else:
        core.resume(order.key, order.first, order.rows)
    return None

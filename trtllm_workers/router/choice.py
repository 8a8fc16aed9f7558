"""A decision of the router and what it saw, as values for people and programs."""

from __future__ import annotations

import msgspec

from trtllm_workers.router.policies import RouterMode
from trtllm_workers.types import Address


class Row(msgspec.Struct, frozen=True, gc=False):
    """One worker as a decision saw it. Tokens are the prompt's; ``waiting_tokens`` those before it.

    ``cost`` is the sum of the last three, which ``cost.py`` explains. ``capped``: it has so many
    requests that its cache did not count.
    """

    worker_id: str
    overlap_tokens: int
    uncached_tokens: int
    waiting_tokens: int
    running: int
    free_blocks: int
    cost: float
    capped: bool
    overlap_cost: float
    load_cost: float
    free_cost: float


class Choice(msgspec.Struct, frozen=True):
    """The worker for a request, and why: ``rows`` are it and the next best ones (mode kv only)."""

    address: Address
    worker_id: str
    mode: RouterMode
    overlap_tokens: int
    prompt_tokens: int
    cost: float
    reason: str
    rows: tuple[Row, ...] = ()

"""How one of several workers is picked without regard to what they hold: functions. Pure.

Each returns one of ``numbers``. ``last_turns`` tells for each number when it was last picked; who was
picked longest ago comes first, so turns are equal among whatever workers a request may go to. Mode kv
is in ``cost.py``, which needs numpy; this does not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import StrEnum


class RouterMode(StrEnum):
    """How a request's workers are chosen."""

    RANDOM = "random"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    KV = "kv"


def pick_random(numbers: Sequence[int], rng: random.Random) -> int:
    """Return any worker."""
    return rng.choice(numbers)


def round_robin(numbers: Sequence[int], last_turns: Sequence[float]) -> int:
    """Return the worker whose turn it is."""
    return min(numbers, key=last_turns.__getitem__)


def least_loaded(
    numbers: Sequence[int], requests: Sequence[float], last_turns: Sequence[float]
) -> int:
    """Return the worker with the fewest requests; equal ones take turns."""
    return min(numbers, key=lambda number: (requests[number], last_turns[number]))

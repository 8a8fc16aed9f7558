"""How one of several workers is picked: functions over columns, one per router mode. Pure.

Each returns an index. ``turn`` grows by one per request, so that equal workers take turns.
"""

from __future__ import annotations

import random
from enum import StrEnum

import numpy as np

from trtllm_workers.router.cost import Floats

# Costs nearer than this are equal.
_EPSILON = 1e-9


class RouterMode(StrEnum):
    """How a request's workers are chosen."""

    RANDOM = "random"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    KV = "kv"


def pick_random(count: int, rng: random.Random) -> int:
    """Return any of ``count`` workers."""
    return rng.randrange(count)


def round_robin(count: int, turn: int) -> int:
    """Return the next of ``count`` workers."""
    return turn % count


def least(values: Floats, turn: int) -> int:
    """Return the worker with the least load or cost; equal ones take turns."""
    best = np.flatnonzero(values <= values.min() + _EPSILON)
    return int(best[turn % len(best)])


def draw(values: Floats, temperature: float, rng: random.Random) -> int:
    """Return a worker drawn by softmax over negative costs: cheaper ones are likelier."""
    odds = np.exp((values.min() - values) / temperature)
    ladder = np.cumsum(odds)
    return int(min(np.searchsorted(ladder, rng.random() * ladder[-1]), len(values) - 1))

"""What tunes mode kv. Computes nothing, and loads no numpy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the cost's terms (``cost.py``), and what else tunes mode kv.

    ``temperature`` 0 takes the lowest cost; above, costs are drawn from by softmax. A worker with more
    requests than ``affinity_cap`` times the mean (and a few) gets no credit for its cache; 0: no cap.
    Without events a prompt is taken for cached for ``ttl_s`` seconds after its last use.
    """

    overlap: float = 1.0
    load: float = 1.0
    free: float = 1.0
    temperature: float = 0.0
    affinity_cap: float = 2.0
    ttl_s: float = 120.0

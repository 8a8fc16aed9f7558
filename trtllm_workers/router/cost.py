"""What a request would cost at each worker, as arrays over workers. Pure.

::

    cost = overlap × (uncached + waiting) / prompt
         + load    × (requests - fewest) / (1 + mean requests)
         + free    × (needed - available) / needed        where it needs more than is available

The unit is "computing this prompt once". The first term is how long it takes until the prompt is
computed: its own uncached tokens and those that wait there before it. The second is how much more the
worker has to do than the others, against their mean, so that it means the same on a quiet and a busy
pool. The third is the share of blocks that would have to be taken from running requests. Without shared
prefixes the first term differs only by what waits, so the choice becomes that of the least loaded one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
else:
    Floats = Bools = Any

# Few requests are no pile: the cap on affinity looks at what is above so many.
CAP_SLACK_REQUESTS = 4.0


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of the cost's terms, and what else tunes mode kv.

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


@dataclass(frozen=True, slots=True)
class Loads:
    """The workers as columns: requests there, prompt tokens that wait to be computed, KV blocks that can
    be had. ``barred`` is 0 where a worker may take the request and infinite elsewhere.
    """

    requests: Floats
    waiting_tokens: Floats
    available_blocks: Floats
    barred: Floats

    @property
    def mean_requests(self) -> float:
        """Requests per worker that may take one more."""
        able = self.barred == 0.0
        return float(self.requests @ able) / max(1, int(np.count_nonzero(able)))


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of each worker (infinite for a barred one), and what it is made of.

    ``capped`` tells whose cache does not count; None: everybody's does.
    """

    total: Floats
    overlap_tokens: Floats
    capped: Bools | None


def costs(
    loads: Loads, overlap_tokens: Floats, prompt_tokens: int, block_size: int, weights: Weights
) -> Costs:
    """Return the cost of a prompt at each worker; see the module's formula."""
    requests = loads.requests
    mean = loads.mean_requests
    capped = None
    if weights.affinity_cap:
        limit = weights.affinity_cap * mean + CAP_SLACK_REQUESTS
        if requests.max() > limit:
            capped = requests > limit
            overlap_tokens = np.where(capped, 0.0, overlap_tokens)
    uncached = prompt_tokens - overlap_tokens
    total = uncached + loads.waiting_tokens
    total *= weights.overlap / max(1, prompt_tokens)
    if weights.load:
        busier = requests + loads.barred
        busier -= busier.min()
        busier *= weights.load / (1.0 + mean)
        total += busier
    else:
        total += loads.barred
    if weights.free and loads.available_blocks.min() * block_size < prompt_tokens + block_size:
        needed = np.maximum(1.0, np.ceil(uncached / block_size))
        total += weights.free * np.maximum(0.0, 1.0 - loads.available_blocks / needed)
    return Costs(total, overlap_tokens, capped)

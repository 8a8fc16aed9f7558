"""What a request would cost at each worker, as arrays over workers. Pure.

::

    cost = overlap × (uncached + waiting) / prompt
         + load    × (requests - fewest) / (2 + 2 × mean requests)
         + free    × (needed - available) / needed        where it needs more than is available

The unit is "computing this prompt once". The first term is how long it takes until the prompt is
computed: its own uncached tokens and those that wait there before it, both in tokens. The second is how
much more the worker has to do than the others, against their mean, so that it means the same on a quiet
and a busy pool. Twice the mean costs half a prompt: answering slows a worker far less than computing
prompts does, and with twice this weight chats are torn from their cache by differences of one request.
The third is the share of blocks that would have to be taken from running requests. Without shared
prefixes the first term differs only by what waits, so the choice becomes that of the least loaded one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trtllm_workers.router.weights import Weights

if TYPE_CHECKING:
    import random

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
else:
    Floats = Bools = Any

# Few requests are no pile: the cap on affinity looks at what is above so many.
CAP_SLACK_REQUESTS = 4.0
# Costs nearer than this are equal.
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Mask:
    """Workers that a request may go to: how many, 1 for each in ``able``, 0 for each in ``barred``, where
    the others are 0 and infinite.
    """

    count: int
    able: Floats
    barred: Floats


@dataclass(frozen=True, slots=True)
class Columns:
    """The workers as columns: requests there, prompt tokens that wait to be computed, KV blocks that can
    be had (infinite where there is no worker); and who may take the request.
    """

    requests: Floats
    waiting_tokens: Floats
    available_blocks: Floats
    mask: Mask

    @property
    def mean_requests(self) -> float:
        """Requests per worker that may take one more."""
        return float(self.requests @ self.mask.able) / max(1, self.mask.count)


@dataclass(frozen=True, slots=True)
class Costs:
    """The cost of each worker (infinite for a barred one), and what it is made of: three parts and the
    overlap that counts.

    ``free`` None: nobody is short of blocks. ``capped`` tells whose cache does not count; None:
    everybody's does.
    """

    total: Floats
    overlap: Floats
    load: Floats
    free: Floats | None
    overlap_tokens: Floats
    capped: Bools | None


def costs(
    columns: Columns, overlap_tokens: Floats, prompt_tokens: int, block_size: int, weights: Weights
) -> Costs:
    """Return the cost of a prompt at each worker; see the module's formula."""
    requests = columns.requests
    mean = columns.mean_requests
    capped = None
    if weights.affinity_cap:
        limit = weights.affinity_cap * mean + CAP_SLACK_REQUESTS
        if requests.max() > limit:
            capped = requests > limit
            overlap_tokens = np.where(capped, 0.0, overlap_tokens)
    uncached = prompt_tokens - overlap_tokens
    compute = uncached + columns.waiting_tokens
    compute *= weights.overlap / max(1, prompt_tokens)
    load = columns.mask.barred  # infinite stays infinite, whatever the weight
    if weights.load:
        load = requests + load
        load -= load.min()
        load *= weights.load / (2.0 + 2.0 * mean)
    total = compute + load
    free = None
    if weights.free and columns.available_blocks.min() * block_size < prompt_tokens + block_size:
        needed = np.maximum(1.0, np.ceil(uncached / block_size))
        free = weights.free * np.maximum(0.0, 1.0 - columns.available_blocks / needed)
        total += free
    return Costs(total, compute, load, free, overlap_tokens, capped)


def cheapest(total: Floats, last_turns: Floats) -> int:
    """Return the worker with the lowest cost; of equal ones the one whose last turn is longest ago."""
    best = np.flatnonzero(total <= total.min() + _EPSILON)
    return int(best[last_turns[best].argmin()]) if len(best) > 1 else int(best[0])


def draw(total: Floats, temperature: float, rng: random.Random) -> int:
    """Return a worker drawn by softmax over negative costs: cheaper ones are likelier."""
    odds = np.exp((total.min() - total) / temperature)
    ladder = np.cumsum(odds)
    # Right of what is drawn: a barred worker adds nothing to the ladder, so none is ever hit.
    return int(np.searchsorted(ladder, rng.random() * ladder[-1], side="right"))

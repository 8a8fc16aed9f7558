"""One request inside the simulator: its tokens, its blocks, its phase. Schedules nothing."""

from __future__ import annotations

import random
from enum import Enum, auto

from trtllm_workers.blocks import block_hash, block_hashes
from trtllm_workers.engines.base import Deliver
from trtllm_workers.engines.sim.tokens import Continuation, Vocabulary
from trtllm_workers.types import GenerateRequest

NO_STOP = -1


class Phase(Enum):
    """Where a stream is. Preemption leads from PREFILL or DECODE back to WAITING."""

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    ENDED = auto()


class Stream:
    """State of one accepted request.

    ``tokens`` begins with the prompt and runs ahead of what was delivered: ``num_known`` of them are
    prompt or delivered. KV exists for the first ``num_computed``; while decoding that is kept as
    ``num_known - 1`` and not written down each step. ``hashes`` chain the full blocks known so far,
    ``num_shared`` of them are held in the pool, ``num_private`` blocks come on top. At index
    ``pause`` the next token needs more than a look into ``tokens``.
    """

    __slots__ = (
        "arrival",
        "cached_tokens",
        "continuation",
        "deliver",
        "hashes",
        "limit",
        "num_computed",
        "num_known",
        "num_private",
        "num_shared",
        "pause",
        "phase",
        "prompt_len",
        "request_id",
        "root",
        "stop_index",
        "tokens",
        "was_admitted",
    )

    def __init__(
        self,
        request: GenerateRequest,
        deliver: Deliver,
        *,
        arrival: int,
        vocabulary: Vocabulary,
        eos_probability: float,
        block_size: int,
        root: bytes | None,
    ) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.deliver = deliver
        self.arrival = arrival
        self.tokens = list(request.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.limit = self.prompt_len + sampling.max_tokens
        self.phase = Phase.WAITING
        self.num_known = self.prompt_len
        self.num_computed = 0
        self.num_shared = 0
        self.num_private = 0
        self.cached_tokens = 0
        self.was_admitted = False
        self.pause = self.prompt_len
        self.stop_index = NO_STOP
        self.root = root
        self.hashes = [] if root is None else block_hashes(self.tokens, block_size, root)
        seed: int | None = None
        if sampling.temperature > 0:
            seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
        self.continuation = Continuation(
            vocabulary,
            self.tokens,
            seed=seed,
            stop_ids=frozenset(sampling.stop_token_ids),
            stop_from=self.prompt_len + sampling.min_tokens,
            eos_probability=0.0 if sampling.ignore_eos else eos_probability,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks this stream holds."""
        return self.num_shared + self.num_private

    def hash_full_blocks(self, num_blocks: int, block_size: int) -> None:
        """Let ``hashes`` reach the first ``num_blocks`` blocks; their tokens are known."""
        if self.root is None:
            return
        while len(self.hashes) < num_blocks:
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(block_hash(parent, self.tokens[start : start + block_size]))

    def extend(self) -> None:
        """Make the next tokens, ahead of their delivery."""
        stop = self.continuation.extend(self.tokens, self.limit)
        if stop is not None:
            self.stop_index = stop

    def set_pause(self, block_size: int) -> None:
        """Find the next index at which a block fills, tokens run out, or the stream ends."""
        index = self.num_known
        pause = min(index + (-index) % block_size, self.limit - 1, len(self.tokens))
        self.pause = pause if self.stop_index == NO_STOP else min(pause, self.stop_index)

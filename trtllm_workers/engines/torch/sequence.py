"""One request inside the engine: its tokens, its blocks, how far it is. Decides nothing."""

from __future__ import annotations

import random
from collections import Counter
from enum import Enum, auto

from trtllm_workers.blocks import block_hash, block_hashes, media_marks
from trtllm_workers.engines.torch.vision.mrope import Positions
from trtllm_workers.types import GenerateRequest

_SEED_BITS = 63

# Where the rows of a prompt's images lie: (first token, first row of the media store, how many), in order.
Rows = tuple[tuple[int, int, int], ...]


class Purpose(Enum):
    """What a sequence is for; a reserved one that is resumed becomes GENERATE."""

    GENERATE = auto()
    PREFILL = auto()  # ends with its first token, blocks pinned
    RESERVE = auto()  # takes its blocks, and computes nothing until it is resumed


class Sequence:
    """Mutable state of one request, owned by the engine thread.

    ``tokens`` is prompt and output so far; KV of the first ``num_computed`` is in ``blocks``, of
    which the first ``num_stored`` are shared under ``hashes``. A sequence computes the rest of
    ``tokens`` in one or several steps and then samples one more: decoding is the case of one.

    ``rows`` are those of its images, if it has some and they are here; ``positions`` tells where its tokens
    stand if that is not where they are in the prompt. While it waits after a preemption, ``saved`` is the KV
    of its first ``num_saved`` tokens if it cannot compute them again.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "cached_tokens",
        "hashes",
        "marks",
        "num_computed",
        "num_prompt",
        "num_saved",
        "num_stored",
        "output_counts",
        "positions",
        "prompt_ids",
        "purpose",
        "request",
        "root",
        "rows",
        "saved",
        "seed",
        "tokens",
    )

    def __init__(
        self,
        request: GenerateRequest,
        arrival: int,
        root: bytes,
        block_size: int,
        purpose: Purpose = Purpose.GENERATE,
        rows: Rows = (),
    ) -> None:
        sampling = request.sampling
        media = request.media
        self.request = request
        self.arrival = arrival
        self.purpose = purpose
        self.root = root
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.blocks: list[int] = []
        self.marks = media_marks(media, block_size)
        self.hashes = block_hashes(self.tokens, block_size, root, self.marks)
        self.rows = rows
        self.positions = (
            Positions(self.num_prompt, media) if media and media[0].grid is not None else None
        )
        self.num_saved = 0
        self.saved: list[bytes] = []
        self.num_computed = 0
        self.num_stored = 0
        self.cached_tokens: int | None = None  # unknown until first scheduled
        # A drawn seed stays with the request, so that preemption changes nothing. It does not travel
        # with a handoff: without a seed of its own a request draws one on either side.
        self.seed = random.getrandbits(_SEED_BITS) if sampling.seed is None else sampling.seed
        self.prompt_ids = sorted(set(self.tokens)) if sampling.repetition_penalty != 1.0 else []
        self.output_counts: Counter[int] | None = (
            Counter()
            if sampling.repetition_penalty != 1.0
            or sampling.presence_penalty
            or sampling.frequency_penalty
            else None
        )

    @property
    def num_output(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def can_recompute(self) -> bool:
        """Whether its KV could be computed here: not that of images whose rows are elsewhere."""
        return not self.request.media or bool(self.rows)

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens.append(token)
        if self.output_counts is not None:
            self.output_counts[token] += 1

    def extend_hashes(self, block_size: int) -> None:
        """Hash the blocks that ``num_computed`` has filled since."""
        while (len(self.hashes) + 1) * block_size <= self.num_computed:
            first = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.root
            mark = self.marks.get(len(self.hashes), b"")
            self.hashes.append(block_hash(parent, self.tokens[first : first + block_size], mark))

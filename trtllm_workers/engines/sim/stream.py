"""One request inside the simulator: its tokens, its blocks, its phase. Schedules nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum, auto

from trtllm_workers.blocks import block_hash, block_hashes, media_marks
from trtllm_workers.engines.base import Deliver
from trtllm_workers.engines.sim.tokens import Continuation, Vocabulary
from trtllm_workers.types import GenerateRequest, TokenChunk

NO_STOP = -1


class Phase(Enum):
    """Where a stream is.

    Preemption leads from PREFILL or DECODE back to WAITING. PINNED: the prompt is computed and its
    blocks wait to be fetched. RESERVED: the blocks wait for KV from elsewhere; ``resume`` leads to
    DECODE, or to PREFILL when none came.
    """

    WAITING = auto()
    PREFILL = auto()
    DECODE = auto()
    PINNED = auto()
    RESERVED = auto()
    ENDED = auto()


class Purpose(Enum):
    """What the caller asked for."""

    GENERATE = auto()
    PREFILL = auto()
    RESERVE = auto()


class Stream:
    """State of one accepted request.

    ``tokens`` begins with the prompt and runs ahead of what was delivered: ``num_known`` of them are
    prompt or delivered. KV exists for the first ``num_computed``; while decoding that is kept as
    ``num_known - 1`` and not written down each step. ``hashes`` chain the full blocks known so far;
    the first ``num_shared`` of ``blocks`` are shared under them, the others are private. At index
    ``pause`` the next token needs more than a look into ``tokens``. ``deliver`` gets the chunks, and
    the end; ``on_held`` is called once the blocks of a handoff are held, with the first token if it
    was computed here. ``on_ended`` is called once, when it holds nothing any more. ``marks`` are what the
    hashes of blocks with images cover besides tokens. ``started_s`` is when its first step began.
    """

    __slots__ = (
        "_continuation",
        "_eos_probability",
        "_seed",
        "_vocabulary",
        "arrival",
        "blocks",
        "cached_tokens",
        "deliver",
        "hashes",
        "limit",
        "marks",
        "num_computed",
        "num_known",
        "num_shared",
        "on_ended",
        "on_held",
        "pause",
        "phase",
        "prompt_len",
        "purpose",
        "request",
        "request_id",
        "reuse",
        "root",
        "started_s",
        "stop_index",
        "tokens",
        "was_admitted",
        "wrong_kv",
    )

    def __init__(
        self,
        request: GenerateRequest,
        deliver: Deliver,
        *,
        purpose: Purpose,
        arrival: int,
        vocabulary: Vocabulary,
        eos_probability: float,
        block_size: int,
        root: bytes,
        reuse: bool,
    ) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.deliver = deliver
        self.on_held: Callable[[TokenChunk | None], None] = _ignore
        self.on_ended: Callable[[], None] = nothing_held
        self.purpose = purpose
        self.arrival = arrival
        self.tokens = list(request.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.limit = self.prompt_len + sampling.max_tokens
        self.phase = Phase.WAITING
        self.num_known = self.prompt_len
        self.num_computed = 0
        self.num_shared = 0
        self.blocks: list[int] = []
        self.cached_tokens = 0
        self.was_admitted = False
        self.started_s: float | None = None
        self.pause = self.prompt_len
        self.stop_index = NO_STOP
        self.root = root
        self.reuse = reuse
        self.marks = media_marks(request.media, block_size)
        self.hashes = block_hashes(self.tokens, block_size, root, self.marks) if reuse else []
        self.wrong_kv = b""
        self.request = request
        self._vocabulary = vocabulary
        self._eos_probability = 0.0 if sampling.ignore_eos else eos_probability
        self._seed: int | None = None
        if sampling.temperature > 0:
            self._seed = random.getrandbits(64) if sampling.seed is None else sampling.seed
        self._continuation: Continuation | None = None

    def hash_full_blocks(self, num_blocks: int, block_size: int) -> None:
        """Let ``hashes`` reach the first ``num_blocks`` blocks; their tokens are known."""
        while len(self.hashes) < num_blocks:
            start = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.root
            mark = self.marks.get(len(self.hashes), b"")
            self.hashes.append(block_hash(parent, self.tokens[start : start + block_size], mark))

    def stop_sharing(self) -> None:
        """Share no further block: what its blocks hold is not the KV of its tokens."""
        self.reuse = False
        del self.hashes[self.num_shared :]

    def extend(self) -> None:
        """Make the next tokens, ahead of their delivery."""
        if self._continuation is None:
            self._continuation = self._continue()
        limit = self.prompt_len + 1 if self.purpose is Purpose.PREFILL else self.limit
        stop = self._continuation.extend(self.tokens, limit)
        if stop is not None:
            self.stop_index = stop

    def set_pause(self, block_size: int) -> None:
        """Find the next index at which a block fills, tokens run out, or the stream ends."""
        index = self.num_known
        pause = min(index + (-index) % block_size, self.limit - 1, len(self.tokens))
        self.pause = pause if self.stop_index == NO_STOP else min(pause, self.stop_index)

    def _continue(self) -> Continuation:
        """Return what goes on from ``tokens`` as they are now."""
        sampling = self.request.sampling
        return Continuation(
            self._vocabulary,
            self.tokens,
            seed=self._seed,
            stop_ids=frozenset(sampling.stop_token_ids),
            stop_from=self.prompt_len + sampling.min_tokens,
            eos_probability=self._eos_probability,
            # As if the prompt were one block: every image, where it is and how large.
            images=b"".join(media_marks(self.request.media, self.prompt_len).values()),
            wrong_kv=self.wrong_kv,
        )


def nothing_held() -> None:
    """Nothing is held besides blocks."""


def _ignore(_first: TokenChunk | None) -> None:
    """Tell nobody."""

"""What one step of the simulator computes, and its bounds. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm_workers.engines.sim.stream import Stream


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine config says about batches; ``block_size`` in tokens."""

    block_size: int
    max_running: int
    max_num_tokens: int
    chunked_prefill: bool
    reuse: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """``num_tokens`` of a stream's prompt to compute in a step, after ``start`` others."""

    stream: Stream
    start: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step's work: prompt chunks, and one token for each decoding stream."""

    chunks: tuple[Chunk, ...]
    num_decoding: int

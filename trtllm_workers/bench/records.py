"""What is known of one request afterwards, and whether it is what was asked for. Knows no socket."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import msgspec

from trtllm_workers.bench.workload import Workload


class Record(msgspec.Struct, kw_only=True):
    """One request. Times are seconds since the level began.

    ``intended_s`` is when it was meant to start: in an open loop the time of arrival, also when the
    client was late; in a closed loop ``start_s``. ``chunks_s`` are the times of chunks with text.
    ``problem`` names what was wrong with it; "" for a good one. ``text`` is kept where asked for.
    """

    index: int
    intended_s: float = 0.0
    start_s: float = 0.0
    end_s: float = 0.0
    chunks_s: list[float] = msgspec.field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str = ""
    problem: str = ""
    text: str = ""

    @property
    def ttft_s(self) -> float:
        """From the intended start to the first chunk with text read by the client."""
        return self.chunks_s[0] - self.intended_s

    @property
    def latency_s(self) -> float:
        """From the intended start to the end of the answer."""
        return self.end_s - self.intended_s

    @property
    def itl_s(self) -> float | None:
        """(Last token - first token) / (OSL - 1); None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.output_tokens - 1)

    def gaps_s(self) -> list[float]:
        """Return the times between consecutive chunks (ICL)."""
        times = self.chunks_s
        return [after - before for before, after in itertools.pairwise(times)]


def problem_of(record: Record, workload: Workload, *, isl_slack: int = 0) -> str:
    """Return what is wrong with a finished answer; "" when it is what was asked for.

    ``isl_slack``: how far the prompt may be off, for a client whose prompts we did not make.
    """
    if record.problem:
        return record.problem
    if not record.chunks_s:
        return "no text in the answer"
    if not record.output_tokens or not record.prompt_tokens:
        return "no usage in the answer"
    if abs(record.prompt_tokens - workload.isl) > isl_slack:
        return f"prompt of {record.prompt_tokens} tokens, not {workload.isl}"
    if record.output_tokens > workload.osl or (
        workload.ignore_eos and record.output_tokens != workload.osl
    ):
        return f"answer of {record.output_tokens} tokens, not {workload.osl}"
    right = ("length",) if workload.ignore_eos else ("length", "stop")
    if record.finish_reason not in right:
        return f"finish_reason is {record.finish_reason or 'missing'}, not {' or '.join(right)}"
    return ""


def failures(records: Sequence[Record]) -> dict[str, int]:
    """Return how many requests had which problem, the most frequent first."""
    return dict(Counter(one.problem for one in records if one.problem).most_common())

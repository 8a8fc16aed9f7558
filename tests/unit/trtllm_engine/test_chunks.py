from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.engines.trtllm.chunks import ChunkMaker
from trtllm_workers.types import FinishReason, TokenChunk, TokenLogprob


@dataclass
class Logprob:
    logprob: float
    rank: int | None


@dataclass
class Output:
    """TensorRT-LLM's CompletionOutput: one object, changed in place."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[Any] | None = None


def maker(max_tokens: int = 100, *, stops: set[int] | None = None, **more: Any) -> ChunkMaker:
    return ChunkMaker(max_tokens, frozenset(stops or ()), **more)


def test_cumulative_ids_become_what_is_new() -> None:
    output, chunks = Output(), maker()
    output.token_ids = [5]
    assert chunks.take(output, 0) == TokenChunk((5,))
    output.token_ids += [6, 7]  # several tokens of one step
    assert chunks.take(output, 0) == TokenChunk((6, 7))
    assert chunks.take(output, 0) is None  # nothing new
    output.finish_reason = "length"
    assert chunks.take(output, 0) == TokenChunk((), FinishReason.LENGTH)


def test_cached_tokens_are_the_same_in_every_chunk() -> None:
    output, chunks = Output([5]), maker()
    assert chunks.take(output, 64) == TokenChunk((5,), cached_tokens=64)
    output.token_ids.append(6)
    assert chunks.take(output, 0) == TokenChunk((6,), cached_tokens=64)


def test_a_listed_eos_is_hidden_and_counted() -> None:
    chunk = maker(stops={2}).take(Output([5, 2], "stop"), 0)
    assert chunk == TokenChunk((5,), FinishReason.STOP, num_hidden_tokens=1, stop_token_id=2)


def test_a_stop_word_that_was_taken_off_again_is_counted() -> None:
    output, chunks = Output([5, 6]), maker(stops={9})
    chunks.take(output, 0)
    output.token_ids, output.finish_reason, output.stop_reason = (
        [5],
        "stop",
        9,
    )  # shorter than before
    last = chunks.take(output, 0)
    assert last == TokenChunk((), FinishReason.STOP, num_hidden_tokens=1, stop_token_id=9)


def test_an_eos_within_an_answer_that_ignores_it_is_a_token() -> None:
    assert maker(stops=set()).take(Output([5, 2], "length"), 0) == TokenChunk(
        (5, 2), FinishReason.LENGTH
    )


@pytest.mark.parametrize("listed", [[7, 8], [8]], ids=["repeated", "left out"])
def test_the_tokens_of_a_handoff_are_told_once(listed: list[int]) -> None:
    first = TokenChunk((7,), cached_tokens=32)
    output, chunks = Output(), maker(first=first)
    assert chunks.take(output, 0) is None  # nothing has come yet
    output.token_ids = listed
    assert chunks.take(output, 0) == TokenChunk((7, 8), cached_tokens=32)
    output.token_ids = [*listed, 9]
    output.finish_reason = "length"
    assert chunks.take(output, 0) == TokenChunk((9,), FinishReason.LENGTH, cached_tokens=32)


def test_a_handoff_whose_first_output_repeats_only_its_token() -> None:
    first = TokenChunk((7,))
    output, chunks = Output([7]), maker(first=first)
    assert chunks.take(output, 0) == first
    output.token_ids.append(7)  # the same token again is a new one
    assert chunks.take(output, 0) == TokenChunk((7,))


def test_a_cancelled_stream_is_an_abort_and_a_timeout_an_error() -> None:
    assert maker().take(Output([], "cancelled"), 0) == TokenChunk((), FinishReason.ABORT)
    chunk = maker().take(Output([5], "timeout"), 0)
    assert chunk is not None
    assert chunk.finish_reason is FinishReason.ERROR
    assert "timeout" in (chunk.error_message or "")


def test_no_more_tokens_are_told_than_were_asked_for() -> None:
    output, chunks = Output([1, 2]), maker(3)
    chunks.take(output, 0)
    output.token_ids = [1, 2, 3, 4]
    assert chunks.take(output, 0) == TokenChunk((3,), FinishReason.LENGTH)


def test_logprobs_are_those_of_the_new_tokens_best_first() -> None:
    entries = [
        {5: Logprob(-0.5, 2), 6: Logprob(-0.1, 1)},
        {7: Logprob(-0.2, 1), 8: Logprob(-0.9, 2)},
    ]
    output, chunks = Output([5], logprobs=entries[:1]), maker(num_logprobs=1)
    first = chunks.take(output, 0)
    assert first is not None
    assert first.logprobs == (TokenLogprob(5, -0.5, [(6, -0.1)]),)
    output.token_ids, output.logprobs = [5, 7], entries
    second = chunks.take(output, 0)
    assert second is not None
    assert second.logprobs == (TokenLogprob(7, -0.2, [(7, -0.2)]),)


def test_logprobs_may_be_plain_numbers() -> None:
    chunk = maker(num_logprobs=0).take(Output([5], logprobs=[-0.25]), 0)
    assert chunk is not None
    assert chunk.logprobs == (TokenLogprob(5, -0.25),)


@given(
    answer=st.lists(st.integers(3, 50), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=30),
    repeated=st.booleans(),
)
def test_however_an_answer_is_cut_its_tokens_are_told_once_and_in_order(
    answer: list[int], cuts: list[int], repeated: bool
) -> None:
    first = TokenChunk((1,))
    output = Output()
    chunks = maker(len(answer) + 1, stops={2}, first=first)
    listed = [1, *answer] if repeated else list(answer)
    told: list[int] = []
    reasons = []
    at = 0
    for cut in [*cuts, len(listed)]:
        at = min(len(listed), at + cut)
        output.token_ids = listed[:at]
        output.finish_reason = "length" if at == len(listed) else None
        if (chunk := chunks.take(output, 0)) is not None:
            told += chunk.token_ids
            reasons.append(chunk.finish_reason)
        if at == len(listed):
            break
    assert told == [1, *answer]
    assert reasons[-1] is FinishReason.LENGTH
    assert not any(reasons[:-1])

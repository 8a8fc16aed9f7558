from __future__ import annotations

import pytest

from tests.unit.bench.made import WORKLOAD, event, record, text_event
from trtllm_workers.bench.answer import Answer, error_of
from trtllm_workers.bench.records import Record, failures, problem_of

ROLE = event(choices=[{"delta": {"role": "assistant", "content": ""}}])
END = event(choices=[{"delta": {}, "finish_reason": "length"}])
USAGE = event(
    choices=[],
    usage={
        "prompt_tokens": 100,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 32},
    },
)
DONE = b"data: [DONE]\n\n"


def answered(
    *pieces: bytes, status: int = 200, content_type: bytes = b"text/event-stream; charset=utf-8"
) -> Record:
    """Return the record of an answer whose pieces come at 1, 2, 3 … s after its start at 10 s."""
    made = Record(index=0)
    answer = Answer(made, 10.0, keep_text=True)
    answer.begin(status, content_type)
    for number, piece in enumerate(pieces, 1):
        answer.feed(piece, 10.0 + number)
    answer.end(10.0 + len(pieces))
    return made


def test_every_chunk_with_text_has_its_time_and_others_have_none() -> None:
    made = answered(ROLE, text_event("Hel"), text_event("lo"), END, USAGE + DONE)
    assert made.problem == ""
    assert made.chunks_s == [2.0, 3.0]
    assert made.text == "Hello"
    assert (made.prompt_tokens, made.output_tokens, made.cached_tokens) == (100, 2, 32)
    assert (made.finish_reason, made.end_s) == ("length", 5.0)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_a_stream_cut_anywhere_says_the_same(size: int) -> None:
    whole = ROLE + text_event("a\n\nb") + text_event("ü") + END + USAGE + DONE
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    made = answered(*pieces)
    assert (made.text, len(made.chunks_s), made.problem) == ("a\n\nbü", 2, "")


def test_other_line_ends_comments_and_no_blank_are_understood() -> None:
    stream = b": ping\n\n" + text_event("a") + END + USAGE + DONE
    made = answered(stream.replace(b"\n", b"\r\n").replace(b"data: ", b"data:"))
    assert (made.text, made.problem) == ("a", "")


def test_thinking_counts_as_text() -> None:
    made = answered(event(choices=[{"delta": {"reasoning_content": "hm"}}]), END + USAGE + DONE)
    assert made.chunks_s == [1.0]


@pytest.mark.parametrize(
    ("pieces", "status", "problem"),
    [
        ([b'{"error": {"message": "full"}}'], 429, "HTTP 429: full"),
        ([b"<html>oh"], 502, "HTTP 502: <html>oh"),
        ([text_event("a")], 200, "the stream ended without [DONE]"),
        ([event(error={"message": "worker lost"}) + DONE], 200, "error in the stream: worker lost"),
        ([b"data: {broken\n\n" + DONE], 200, "an event that cannot be read"),
    ],
)
def test_what_went_wrong_is_named(pieces: list[bytes], status: int, problem: str) -> None:
    assert answered(*pieces, status=status).problem.startswith(problem)


def test_an_answer_that_is_no_stream_is_a_problem() -> None:
    made = answered(b"{}", content_type=b"application/json")
    assert made.problem == "the answer is no stream of events"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"chunks_s": []}, "no text in the answer"),
        ({"output_tokens": 0}, "no usage in the answer"),
        ({"prompt_tokens": 99}, "prompt of 99 tokens, not 100"),
        ({"output_tokens": 10}, "answer of 10 tokens, not 11"),
        ({"finish_reason": "stop"}, "finish_reason is stop, not length"),
        ({"finish_reason": ""}, "finish_reason is missing, not length"),
        ({"problem": "HTTP 500: no"}, "HTTP 500: no"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_named(
    changes: dict[str, object], problem: str
) -> None:
    one = record()
    for name, value in changes.items():
        setattr(one, name, value)
    assert problem_of(one, WORKLOAD) == problem


def test_failures_are_counted_by_problem() -> None:
    records = [record(), record(), record()]
    records[0].problem = records[2].problem = "late"
    assert failures(records) == {"late": 2}


def test_errors_of_any_form_are_one_short_line() -> None:
    assert error_of(b'{"error": "no\\nway"}') == "no way"
    assert error_of(b"") == "(nothing said)"
    assert len(error_of(b"x" * 5000)) == 200

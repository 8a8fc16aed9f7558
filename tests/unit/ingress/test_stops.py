from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_workers.ingress.stops import StopMatcher

letters = st.text(alphabet="ab\n", max_size=12)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[str, str | None]:
    out = ""
    for piece in pieces:
        text, stop = matcher.feed(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + matcher.flush(), None


def test_a_stop_string_over_three_pieces_is_found_and_nothing_of_it_goes_out() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("say S") == ("say ", None)
    assert matcher.held == "S"
    assert matcher.feed("TO") == ("", None)
    assert matcher.feed("P and more") == ("", "STOP")


def test_held_text_goes_out_when_it_was_no_stop_string_after_all() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("ST") == ("", None)
    assert matcher.feed("AR") == ("STAR", None)
    assert matcher.feed("S") == ("", None)
    assert matcher.flush() == "S"
    assert matcher.flush() == ""


def test_the_stop_string_that_completes_first_wins() -> None:
    assert StopMatcher(["abcd", "bc"]).feed("xabcd") == ("xa", "bc")


def test_of_two_that_complete_together_the_longer_wins() -> None:
    assert StopMatcher(["c", "abc"]).feed("xabc") == ("x", "abc")


def test_the_match_goes_out_too_when_asked_for() -> None:
    matcher = StopMatcher(["\n\n"], include=True)
    assert matcher.feed("a\n") == ("a", None)
    assert matcher.feed("\nb") == ("\n\n", "\n\n")


@pytest.mark.parametrize("include", [False, True])
@given(text=letters, stops=stop_lists, cuts=st.lists(st.integers(0, 12), max_size=6))
@settings(max_examples=400, deadline=None)
def test_the_result_does_not_depend_on_where_the_text_is_cut(
    include: bool, text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    in_pieces = run(StopMatcher(stops, include=include), pieces)
    by_character = run(StopMatcher(stops, include=include), list(text))
    assert in_pieces == by_character


@given(text=letters, stops=stop_lists)
@settings(max_examples=400, deadline=None)
def test_what_goes_out_is_the_text_before_the_first_complete_stop_string(
    text: str, stops: list[str]
) -> None:
    out, stop = run(StopMatcher(stops), list(text))
    ends = [text.find(one) + len(one) for one in stops if one in text]
    if not ends:
        assert (out, stop) == (text, None)
    else:
        assert stop is not None
        assert len(out) + len(stop) == min(ends)
        assert text.startswith(out + stop)

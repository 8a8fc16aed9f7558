from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.config.spelling import edit_distance, nearest
from trtllm_workers.config.tables import table
from trtllm_workers.config.values import coerce, parse, problem, shown


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (" 12 ", int, 12),
        ("-1", int, -1),
        ("8e-1", float, 0.8),
        ("1", float, 1.0),
        ("YES", bool, True),
        ("0", bool, False),
        (" kept ", str, " kept "),
        ("a b", Path, Path("a b")),
    ],
)
def test_text_is_parsed_by_kind(text: str, kind: type, value: Any) -> None:
    assert parse(text, kind) == value


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1.0", int),
        ("0x10", int),
        ("1_0", int),
        ("", int),
        ("9" * 31, int),
        ("nan", float),
        ("inf", float),
        ("1e999", float),
        ("1,5", float),
        ("maybe", bool),
        ("2", bool),
    ],
)
def test_text_of_another_form_is_refused(text: str, kind: type) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        parse(text, kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (1, bool), (1.0, int), ("1", int), (float("nan"), float), (10**400, float)],
)
def test_typed_values_of_another_kind_are_refused(value: Any, kind: type) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        coerce(value, kind)


@given(st.floats() | st.integers() | st.text() | st.booleans())
def test_what_coerce_takes_has_the_kind_asked_for(value: Any) -> None:
    for kind in (int, float, bool, str):
        try:
            assert type(coerce(value, kind)) is kind
        except ValueError:
            continue


def test_bounds_are_inclusive_and_named() -> None:
    assert problem(1, minimum=1, maximum=4) is None
    assert problem(4, minimum=1, maximum=4) is None
    assert problem(5, minimum=1, maximum=4) == "must be 1 to 4, not 5"
    assert problem(0, minimum=1) == "must be 1 or more, not 0"
    assert problem(2.5, maximum=1.5) == "must be 1.5 or less, not 2.5"
    assert problem(0, minimum=1, maximum=10_000_000) == "must be 1 to 10000000, not 0"
    assert problem(2**63) is not None


def test_choices_are_named_as_yaml_has_them() -> None:
    assert problem(True, choices=(False,)) == "must be false, not true"
    assert problem("x", choices=("a", "b")) == "must be one of a, b, not 'x'"
    assert problem("b", choices=("a", "b")) is None


def test_values_are_shown_on_one_line() -> None:
    assert shown("a\nb\x1b") == "'a\\nb\\x1b'"
    assert shown("é") == "'é'"
    assert shown("x" * 100) == f"'{'x' * 60}…'"
    assert shown(Path("/" + "x" * 100)) == f"'/{'x' * 100}'"
    assert (shown(None), shown(True), shown(1.5)) == ("null", "true", "1.5")


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "acb", 1), ("abc", "ab", 1), ("kitten", "sitting", 3)],
)
def test_edit_distance_counts_a_swap_as_one(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_nearest_takes_the_nearest_and_is_stable() -> None:
    assert nearest("max_batch_sise", ["max_seq_len", "max_batch_size"]) == "max_batch_size"
    assert nearest("abx", ["abd", "abc"]) == "abc"
    assert nearest("x", ["a", "b"]) is None
    assert nearest("warn", ["debug", "warning"]) == "warning"
    assert nearest("entirely_other", ["max_seq_len"]) is None
    assert nearest("MODEL_PAHT", ["MODEL_PATH"], limit=0) is None


def test_a_table_is_aligned_without_trailing_spaces() -> None:
    assert table(("a", "bb"), [("ccc", "d"), ("", "e")]) == "a    bb\nccc  d\n     e"

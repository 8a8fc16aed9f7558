"""SLURM's hostlists: written out, made, refused with the place."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_workers.deploy.slurm.hostlist import compress, expand
from trtllm_workers.errors import ConfigError

# (a hostlist, its names): what `scontrol show hostnames` of SLURM 22.05 answers.
AS_SLURM_READS = [
    ("login", ["login"]),
    ("sn[1-3]", ["sn1", "sn2", "sn3"]),
    ("sn[1-2,07],login", ["sn1", "sn2", "sn07", "login"]),
    ("a[08-11]", ["a08", "a09", "a10", "a11"]),
    ("a[8-011]", ["a8", "a9", "a10", "a11"]),
    ("a[99-101]", ["a99", "a100", "a101"]),
    ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
    ("rack[1-2]node[09-10]", ["rack1node09", "rack1node10", "rack2node09", "rack2node10"]),
    ("b2,a1,b1", ["b2", "a1", "b1"]),
    ("a1,a1", ["a1", "a1"]),
    ("gpu-a.b_c-[1-2]", ["gpu-a.b_c-1", "gpu-a.b_c-2"]),
]

# (names, their hostlist): what `scontrol show hostlist` answers.
AS_SLURM_WRITES = [
    (["login"], "login"),
    (["sn1", "sn2", "sn3", "sn04"], "sn[1-3,04]"),
    (["sn09", "sn10", "sn11", "sn9", "sn10"], "sn[09-11,9-10]"),
    (
        ["rack1node01", "rack1node02", "rack2node01", "rack2node02"],
        "rack1node[01-02],rack2node[01-02]",
    ),
    (["a1-ib", "a2-ib"], "a1-ib,a2-ib"),
    (["a2", "a1"], "a[2,1]"),
    (["a1", "b1", "a2"], "a1,b1,a2"),
]


@pytest.mark.parametrize(("text", "names"), AS_SLURM_READS)
def test_a_hostlist_stands_for_the_names_that_slurm_sees(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize(("names", "text"), AS_SLURM_WRITES)
def test_names_are_drawn_together_as_slurm_does(names: list[str], text: str) -> None:
    assert compress(names) == text


def test_a_suffix_behind_a_bracket_is_read() -> None:
    assert expand("sn[1-2]-ib,x[1][2]y") == ["sn1-ib", "sn2-ib", "x12y"]


def test_no_hosts_are_an_empty_list() -> None:
    assert expand("") == []
    assert compress([]) == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a[1-2", "column 6: the '\\[' of column 2 is not closed"),
        ("a]", "column 2: '\\]' without"),
        ("a[]", "column 3: a number is missing"),
        ("a[3-1]", "column 3: the range 3-1 goes down"),
        ("a[1x-2]", "column 4: 'x' is not allowed"),
        ("a[1,]", "column 5: a number is missing"),
        ("a,,b", "column 3: a name is missing"),
        ("a,", "column 3: a name is missing after the last comma"),
        (",a", "column 1: a name is missing"),
        ("(null)", "column 1: '\\(' is not allowed"),
        ("srun: error: timed out", "column 5: ':' is not allowed"),
        ("sn1\n", "column 4: '\\\\n' is not allowed"),
        ("a[1-70000]", "more than 65536 names"),
        ("a[1-300]b[1-300]", "more than 65536 names"),
        ("a[1-9999999999999999]", "more than 65536 names"),
    ],
)
def test_what_is_no_hostlist_is_refused_with_the_place(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        expand(text)


@pytest.mark.parametrize("name", ["", "a b", "a,b", "a[1]", "a\n", "a:b"])
def test_what_is_no_host_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no host name"):
        compress(["a1", name])


_NAMES = st.one_of(
    st.from_regex(r"[a-c]{1,2}[0-9]{0,3}([a-b-][0-9]{1,2})?", fullmatch=True),
    st.integers(0, 30).map(lambda number: f"sn{number:02}"),
    st.from_regex(r"[A-Za-z0-9._-]{1,30}", fullmatch=True),
)


@given(st.lists(_NAMES, max_size=60))
def test_names_come_back_as_they_were(names: list[str]) -> None:
    assert expand(compress(names)) == names


def test_ten_thousand_names_take_a_moment() -> None:
    names = [f"rack{rack}node{node:03}" for rack in range(100) for node in range(100)]
    best_s = min(_round_trip_s(names) for _ in range(3))
    assert best_s < 0.1  # 50 ms each way


def _round_trip_s(names: list[str]) -> float:
    started_s = time.perf_counter()
    assert expand(compress(names)) == names
    return time.perf_counter() - started_s

"""The words of ``trtllm-launch bench``; what they do is tested in tests/unit/bench and tests/e2e."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner

from tests.unit.cli.test_cli_help import help_of
from trtllm_workers.cli.main import group
from trtllm_workers.errors import ConfigError


@pytest.mark.parametrize("verb", ["run", "compare", "verdict"])
def test_help_of_each_verb_matches_its_golden_file(
    verb: str, golden: Callable[[str, str], None]
) -> None:
    golden(f"help_bench_{verb}.txt", help_of("bench", verb))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["runn"], "bench has no 'runn'; there are: run, compare, verdict"),
        (["--urll", "x"], "unknown option --urll; did you mean --url?"),
        (["--concurrency", "1,x"], "--concurrency: 'x' is no whole number"),
        (["run", "--request-rate", "0"], "--request-rate: '0' is no number"),
        (["--url", "ftp://h"], "'ftp://h' is no address"),
        (["verdict", "--agg-url", "http://h"], "give both --agg-url and --disagg-url"),
        (["verdict", "--workers", "1"], "--workers 1: prefill and decode need one worker each"),
        (["verdict", "--", "--num-workers", "3"], "--num-workers after -- is the verdict's"),
        (["verdict", "--splits", "1+2"], "--splits: '1+2' is no PREFILL+DECODE of 2 workers"),
        (["compare", "a.json", "b.json"], "a.json cannot be read"),
    ],
)
def test_wrong_words_are_named(words: list[str], complaint: str) -> None:
    done = CliRunner().invoke(group, ["bench", *words], standalone_mode=False)
    assert isinstance(done.exception, ConfigError), done.output
    assert complaint in str(done.exception)

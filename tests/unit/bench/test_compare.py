from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.bench.made import level, results
from trtllm_workers.bench.compare import as_table, compare
from trtllm_workers.bench.picture import overlay_picture, sweep_picture
from trtllm_workers.bench.results import Results, read_results, write_results
from trtllm_workers.bench.svg import log_ticks, nice_ticks, tick_text
from trtllm_workers.cli.main import group
from trtllm_workers.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def sweep(*, itl_s: float = 0.01, spread: float = 0.2, workers: int = 1) -> Results:
    return results([level(n, itl_s=itl_s, spread=spread) for n in (1, 4)], workers=workers)


def test_a_sweep_compared_with_itself_has_no_change_above_noise() -> None:
    comparison = compare(sweep(), sweep())
    assert len(comparison.rows) == 10
    assert comparison.warnings == []
    assert comparison.regressions(0.0) == []
    assert "within noise" in as_table(comparison)


def test_what_became_slower_is_a_regression_above_the_threshold_only() -> None:
    comparison = compare(sweep(), sweep(itl_s=0.012))
    worse = {row.figure for row in comparison.regressions(0.15)}
    assert worse == {"ITL p50 ms", "ITL p90 ms"}
    assert not comparison.regressions(0.25)
    assert {row.figure for row in comparison.regressions(0.05)} == {*worse, "tokens/s"}
    assert not compare(sweep(itl_s=0.012), sweep()).regressions(0.05)


def test_a_change_that_the_spread_explains_is_no_regression() -> None:
    before, after = level(4, spread=3.0), level(4, itl_s=0.0102, spread=3.0)
    rows = compare(results([before]), results([after])).regressions(0.0)
    assert rows == []


def test_warnings_name_what_differs() -> None:
    other = sweep(workers=2)
    other.environment.host = "elsewhere"
    other.levels = [level(4, num_failed=50), level(16)]
    warnings = compare(sweep(), other).warnings
    assert "workers differs: 1 aggregated before, 2 aggregated after" in warnings
    assert any("client's host differs" in one for one in warnings)
    assert "only one of the two has level 1, 16; it is left out" in warnings
    assert "after: level 4 is invalid (failed requests)" in warnings


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, sweep())
    assert read_results(tmp_path) == read_results(path)
    assert read_results(path).levels[0].samples == sweep().levels[0].samples


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", "is no results.json"),
        ("[]", "is no results.json"),
        ('{"schema_version": 99}', "has schema version 99, this command reads 1"),
        ('{"schema_version": 1}', "is no results.json"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        read_results(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_results(tmp_path / "nothing.json")


def test_the_command_ends_with_1_on_a_regression_and_draws_both(tmp_path: Path) -> None:
    one, other, drawn = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.svg"
    write_results(one, sweep())
    write_results(other, sweep(itl_s=0.02))
    command = ["bench", "compare", str(one), str(other), "-o", str(drawn)]

    def code(*words: str) -> object:
        return CliRunner().invoke(group, [*command, *words], standalone_mode=False).return_value

    assert code() == 0
    assert code("--fail-above", "5") == 1
    assert code("--fail-above", "500") == 0
    assert "A p50" in drawn.read_text()


@pytest.mark.parametrize(
    "levels",
    [
        [],
        [level(1)],
        [level(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)],
        [level(4, num_failed=100), level(8, num_failed=3)],
    ],
)
def test_pictures_are_well_formed_whatever_was_measured(levels: list[object]) -> None:
    made = results([])
    made.levels = levels  # type: ignore[assignment]
    root = ElementTree.fromstring(sweep_picture(made))
    assert root.tag == f"{SVG}svg"
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert "TTFT, ms" in texts
    assert "tokens/s in total" in texts
    ElementTree.fromstring(overlay_picture([("<A>", made), ("B & C", made)]))


def test_every_level_is_labelled_and_lies_inside_its_axes() -> None:
    made = results([level(n, itl_s=0.01 * n**0.5) for n in (1, 2, 4, 8, 16)])
    root = ElementTree.fromstring(sweep_picture(made))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    assert all(str(n) in texts for n in (1, 2, 4, 8, 16))
    circles = [float(one.get("cx", "0")) for one in root.iter(f"{SVG}circle")]
    assert len(circles) == 5 + 5 + 5 + 2  # three charts, and a legend in two
    assert all(80 < x < 1140 for x in circles)


def test_ticks_are_round_and_cover_the_values() -> None:
    assert nice_ticks(0, 871) == [0, 200, 400, 600, 800, 1000]
    assert nice_ticks(0, 0.37, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert log_ticks(46, 3600) == [20, 50, 100, 200, 500, 1000, 2000, 5000]
    assert log_ticks(0.9, 30_000) == [0.1, 1, 10, 100, 1000, 10_000, 100_000]
    assert [tick_text(one) for one in (0.0, 0.25, 2000, 20_000)] == ["0", "0.25", "2,000", "20k"]

"""Figures as lines of text: one width per column, units in the header. Computes nothing."""

from __future__ import annotations

from trtllm_workers.bench.results import Level

_COLUMNS = (
    ("load", 8),
    ("good", 6),
    ("failed", 6),
    ("tok/s", 9),
    ("tok/s/user", 10),
    ("TTFT p50", 10),
    ("p90", 10),
    ("p99 ms", 10),
    ("ITL p50", 9),
    ("p90", 9),
    ("p99 ms", 9),
    ("client CPU", 10),
)


def sweep_header() -> str:
    """Return the header above ``level_row``."""
    return "  ".join(name.rjust(width) for name, width in _COLUMNS)


def level_row(level: Level) -> str:
    """Return one level as a row."""
    cells = (
        level.load.in_words,
        str(level.num_good),
        str(level.num_failed),
        f"{level.tokens_per_s:,.1f}",
        plain(level.tokens_per_s_per_user.p50),
        ms(level.ttft_s.p50),
        ms(level.ttft_s.p90),
        ms(level.ttft_s.p99),
        ms(level.itl_s.p50, 2),
        ms(level.itl_s.p90, 2),
        ms(level.itl_s.p99, 2),
        "-" if level.cpu_share is None else f"{level.cpu_share:.0%}",
    )
    widths = (width for _, width in _COLUMNS)
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def ms(seconds: float | None, digits: int = 1) -> str:
    """Return milliseconds; "-" for a figure that too few samples give."""
    return "-" if seconds is None else f"{seconds * 1e3:,.{digits}f}"


def plain(value: float | None) -> str:
    """Return a number with one digit after the point; "-" for none."""
    return "-" if value is None else f"{value:,.1f}"


def percent(share: float) -> str:
    """Return a change with its sign."""
    return f"{share * 100:+.1f} %"

"""Rules about what the router needs of workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.lint.documents import (
    Case,
    Silent,
    aggregated,
    assert_fires,
    assert_silent,
    decode,
    encode,
    prefill,
)
from trtllm_workers.lint.context import LintContext
from trtllm_workers.lint.problem import Severity

EVENTS = "kv_cache_config.event_buffer_max_size"
REUSE = "kv_cache_config.enable_block_reuse"
KV = LintContext(router="kv")
KV_FILLED = LintContext(router="kv", sets_role_keys=True)

FIRES = [
    Case("router-events", Severity.ERROR, EVENTS, "1024", [aggregated()], KV),
    Case(
        "router-events",
        Severity.ERROR,
        EVENTS,
        "announces no blocks",
        [prefill(kv__event_buffer_max_size=0)],
        KV_FILLED,
    ),
    Case(
        "router-events",
        Severity.WARNING,
        EVENTS,
        "buffer of 100 events",
        [aggregated(kv__event_buffer_max_size=100)],
        KV,
    ),
    Case(
        "router-block-reuse",
        Severity.ERROR,
        REUSE,
        "keeps no blocks",
        [aggregated(kv__enable_block_reuse=False)],
        KV_FILLED,
    ),
    Case(
        "router-partial-reuse",
        Severity.NOTE,
        "kv_cache_config.enable_partial_reuse",
        "whole blocks",
        [aggregated(kv__enable_partial_reuse=True)],
        KV,
    ),
    Case(
        "router-stats",
        Severity.WARNING,
        "enable_iter_perf_stats",
        "least_loaded",
        [decode()],
        LintContext(router="least_loaded"),
    ),
    Case(
        "router-stats",
        Severity.WARNING,
        "enable_iter_perf_stats",
        "router kv",
        [decode(enable_iter_perf_stats=False)],
        KV_FILLED,
    ),
]

SILENT = [
    Silent("router-events", "enough", [aggregated(kv__event_buffer_max_size=1024)], KV),
    Silent("router-events", "another router", [aggregated()], LintContext(router="random")),
    Silent("router-events", "the launcher sets it", [aggregated()], KV_FILLED),
    Silent("router-events", "an encode worker has no KV", [encode()], KV),
    Silent("router-block-reuse", "on by default", [aggregated()], KV),
    Silent(
        "router-block-reuse",
        "another router",
        [aggregated(kv__enable_block_reuse=False)],
        LintContext(router="round_robin"),
    ),
    Silent("router-partial-reuse", "nobody chose it", [aggregated()], KV),
    Silent("router-partial-reuse", "off", [aggregated(kv__enable_partial_reuse=False)], KV),
    Silent("router-stats", "on", [aggregated(enable_iter_perf_stats=True)], KV),
    Silent("router-stats", "the launcher sets it", [aggregated()], KV_FILLED),
    Silent("router-stats", "no load asked for", [aggregated()], LintContext(router="random")),
]


@pytest.mark.parametrize("case", FIRES, ids=lambda case: case.id)
def test_rule_speaks(case: Case, tmp_path: Path) -> None:
    assert_fires(case, tmp_path)


@pytest.mark.parametrize("case", SILENT, ids=lambda case: case.id)
def test_rule_is_silent(case: Silent, tmp_path: Path) -> None:
    assert_silent(case, tmp_path)

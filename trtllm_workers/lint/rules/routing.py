"""What the router needs of the workers it sends requests to: KV events, block reuse, statistics."""

from __future__ import annotations

from collections.abc import Iterator

from trtllm_workers.lint.document import Document
from trtllm_workers.lint.problem import Problem, Severity
from trtllm_workers.lint.rules.rule import GENERATING, DocumentRule, Facts

EVENT_BUFFER = 1024
"""Events a worker should be able to hold between two polls."""


def router_events(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The router kv lives on KV events, which are off by default."""
    key = "kv_cache_config.event_buffer_max_size"
    size = doc.get(key)
    if not _routed_by_kv(doc, facts) or not isinstance(size, int) or size >= EVENT_BUFFER:
        return
    if not doc.given(key) and facts.context.sets_role_keys:
        return
    if size <= 0:
        yield doc.problem(
            Severity.ERROR,
            "router-events",
            key,
            "router kv, but this worker announces no blocks: every prompt would look new",
            advice=f"write {key}: {EVENT_BUFFER}",
        )
    else:
        yield doc.problem(
            Severity.WARNING,
            "router-events",
            key,
            f"a buffer of {size} events overflows while blocks are stored quickly, and the router then "
            "starts over with this worker",
            advice=f"write {key}: {EVENT_BUFFER}",
        )


def router_block_reuse(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The router kv looks for blocks that are kept."""
    key = "kv_cache_config.enable_block_reuse"
    if _routed_by_kv(doc, facts) and doc.get(key) is False:
        yield doc.problem(
            Severity.ERROR,
            "router-block-reuse",
            key,
            "router kv, but this worker keeps no blocks of finished requests and announces none",
            advice=f"write {key}: true, or choose another router",
        )


def router_partial_reuse(doc: Document, facts: Facts) -> Iterator[Problem]:
    """The router counts whole blocks only."""
    key = "kv_cache_config.enable_partial_reuse"
    if _routed_by_kv(doc, facts) and doc.given(key) and doc.get(key) is True:
        yield doc.problem(
            Severity.NOTE,
            "router-partial-reuse",
            key,
            "the engine also reuses parts of blocks; the router counts whole blocks only, so cached tokens "
            "can be more than the overlap it chose by",
        )


def router_stats(doc: Document, facts: Facts) -> Iterator[Problem]:
    """Routing by load reads statistics, which are off by default."""
    key = "enable_iter_perf_stats"
    if doc.role not in GENERATING or doc.get(key) is True:
        return
    if facts.context.router not in ("kv", "least_loaded"):
        return
    if doc.given(key) or not facts.context.sets_role_keys:
        yield doc.problem(
            Severity.WARNING,
            "router-stats",
            key,
            f"router {facts.context.router} weighs how full a worker is, and this one reports no statistics",
            advice=f"write {key}: true",
        )


def _routed_by_kv(doc: Document, facts: Facts) -> bool:
    return facts.context.router == "kv" and doc.role in GENERATING


DOCUMENT_RULES: tuple[DocumentRule, ...] = (
    router_events,
    router_block_reuse,
    router_partial_reuse,
    router_stats,
)

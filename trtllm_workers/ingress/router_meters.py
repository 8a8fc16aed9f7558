"""What the router did, as metrics of the ingress. Knows the metrics table, decides nothing."""

from __future__ import annotations

from trtllm_workers.ingress.fleet import Fleet
from trtllm_workers.observe.metrics import Metrics
from trtllm_workers.types import Role

_PREFIX = "trtllm_launch_router_"


def show_router(metrics: Metrics, fleet: Fleet) -> None:
    """Set counters and gauges to what the router has done for the workers that are there."""
    router = fleet.placer.router
    for served in fleet.models.values():
        placed = overlap = 0
        has_prefill = any(worker.role is Role.PREFILL for worker in served.workers)
        for worker in served.chain:
            worker_id = worker.worker_id
            for mode, count in worker.decisions.items():
                metrics.counter(
                    f"{_PREFIX}decisions_total", worker_id=worker_id, mode=mode
                ).advance_to(count)
            for what, total in (
                ("placed_tokens_total", worker.placed_tokens),
                ("overlap_tokens_total", worker.overlap_tokens),
                ("resyncs_total", worker.num_resyncs),
            ):
                metrics.counter(f"{_PREFIX}{what}", worker_id=worker_id).advance_to(total)
            if router.follows_events:
                blocks = fleet.placer.pool_of(worker).num_blocks(worker.record.address)
                metrics.gauge(f"{_PREFIX}index_blocks", worker_id=worker_id).set(blocks)
            # Of a chain, the cache of whoever computes the prompt counts.
            if worker.role is not Role.DECODE or not has_prefill:
                placed += worker.placed_tokens
                overlap += worker.overlap_tokens
        if placed:
            metrics.gauge(f"{_PREFIX}hit_ratio", model=served.name).set(overlap / placed)

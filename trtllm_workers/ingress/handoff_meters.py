"""Workers' counts of handoffs and images as metrics of the ingress. Knows the metrics table, no worker."""

from __future__ import annotations

from trtllm_workers.engines.base import ENGINE_NATIVE
from trtllm_workers.observe.metrics import Metrics
from trtllm_workers.planes.media_messages import MediaStats
from trtllm_workers.planes.messages import HandoffStats, PairStats, WorkerStats

_PREFIX = "trtllm_launch_"
_PHASES = ("queue", "prefill", "transfer", "first_decode")


def observe_phases(metrics: Metrics, model: str, handoffs: HandoffStats) -> None:
    """Take over what first tokens spent their time on since the worker's last report."""
    for phases in handoffs.phases:
        for phase, seconds in zip(_PHASES, phases, strict=True):
            metrics.histogram(
                f"{_PREFIX}first_token_phase_seconds", model=model, phase=phase
            ).observe(seconds)
    for seconds in handoffs.queue_waits:
        metrics.histogram(f"{_PREFIX}prefill_queue_seconds", model=model).observe(seconds)


def show_handoffs(metrics: Metrics, load: WorkerStats) -> None:
    """Set a worker's counters and gauges to what it said last."""
    worker_id, stats, handoffs = load.worker_id, load.stats, load.handoffs

    def counter(what: str, total: float, **labels: str) -> None:
        metrics.counter(f"{_PREFIX}{what}", worker_id=worker_id, **labels).advance_to(total)

    for state, count in (("pinned", stats.pinned_blocks), ("reserved", stats.reserved_blocks)):
        metrics.gauge(f"{_PREFIX}handoff_blocks", worker_id=worker_id, state=state).set(count)
    counter("blocks_allocated_total", stats.allocated_blocks)
    counter("blocks_freed_total", stats.freed_blocks)
    counter("leaked_blocks_total", handoffs.leaked_blocks)
    counter("local_prefills_total", handoffs.local)
    for state, count in (("offered", handoffs.offered), ("fetching", handoffs.fetching)):
        if count:
            counter("handoffs_total", count, state=state, cause="")
    for state, cause, count in handoffs.ended:
        counter("handoffs_total", count, state=state, cause=cause)
    for cause, count in handoffs.fallbacks:
        counter("prefill_fallbacks_total", count, cause=cause)
    for outcome, count in handoffs.queue_jobs:
        counter("prefill_queue_jobs_total", count, outcome=outcome)
    if handoffs.redelivered:
        counter("prefill_queue_redelivered_total", handoffs.redelivered)
    if handoffs.queue_depth >= 0:
        depth = metrics.gauge(f"{_PREFIX}prefill_queue_requests", worker_id=worker_id)
        depth.set(handoffs.queue_depth)
    for pair in load.pairs:
        _show_pair(metrics, worker_id, pair)
    if load.media is not None:
        _show_media(metrics, worker_id, load.media)


def _show_media(metrics: Metrics, worker_id: str, media: MediaStats) -> None:
    def counter(what: str, total: float, **labels: str) -> None:
        metrics.counter(f"{_PREFIX}media_{what}", worker_id=worker_id, **labels).advance_to(total)

    def gauge(what: str, value: float, state: str) -> None:
        metrics.gauge(f"{_PREFIX}media_{what}", worker_id=worker_id, state=state).set(value)

    for source, count in media.items:
        counter("items_total", count, source=source)
    counter("encode_seconds_total", media.encode_seconds)
    for work, code, count in media.failures:
        counter("failures_total", count, work=work, code=code)
    for result, count in (("hit", media.num_hits), ("miss", media.num_misses)):
        counter("lookups_total", count, result=result)
    for flow in media.flows:
        labels = {"peer": flow.peer, "transport": flow.transport, "wire": flow.wire}
        counter("fetches_total", flow.num_fetches, **labels)
        counter("fetch_bytes_total", flow.num_bytes, **labels)
        counter("fetch_seconds_total", flow.seconds, **labels)
    gauge("kept_images", media.num_pinned, "pinned")
    gauge("kept_images", media.num_kept - media.num_pinned, "cached")
    gauge("memory_bytes", media.free_bytes, "free")
    gauge("memory_bytes", media.claimed_bytes, "claimed")


def _show_pair(metrics: Metrics, worker_id: str, pair: PairStats) -> None:
    peer = pair.peer.peer_id
    metrics.gauge(f"{_PREFIX}kv_pairs", worker_id=worker_id, peer=peer, state=pair.state).set(1)
    for result, count in (
        ("passed", pair.canary_passed),
        ("failed", pair.canary_failed),
        ("mismatch", pair.canary_mismatched),
    ):
        metrics.counter(
            f"{_PREFIX}canary_total", worker_id=worker_id, peer=peer, result=result
        ).advance_to(count)
    if not pair.transport:
        return
    labels = {
        "worker_id": worker_id,
        "peer": peer,
        "transport": pair.transport,
        "wire": pair.wire,
    }
    totals = {"transfers_total": pair.num_handoffs, "transfer_seconds_total": pair.seconds}
    if pair.transport != ENGINE_NATIVE:
        totals["transfer_bytes_total"] = pair.num_bytes
    for what, total in totals.items():
        metrics.counter(f"{_PREFIX}kv_{what}", **labels).advance_to(total)
    if pair.transport == ENGINE_NATIVE:
        return  # the engine does not tell how many bytes it moved: no rate rather than 0
    metrics.gauge(f"{_PREFIX}kv_transfer_gigabytes_per_second", **labels).set(pair.gb_per_s)

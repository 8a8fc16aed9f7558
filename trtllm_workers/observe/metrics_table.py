"""The table of metrics: every name, kind, label, bucket and help text. Counts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric. ``buckets`` are the upper bounds of a histogram, ascending, without infinity."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


# Bounds in seconds, near-geometric: a request takes milliseconds on the sim engine and minutes on
# a long answer; the gap between two tokens is far smaller.
_REQUEST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_FIRST_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_GAP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 5)

TABLE: tuple[Spec, ...] = (
    # Written by the ingress. Label model is the served name, "unknown" for a name nobody serves:
    # labels never hold what a client made up.
    Spec(
        "trtllm_launch_requests_total",
        "counter",
        ("endpoint", "model", "status"),
        "Requests answered, by HTTP status; a stream that broke after 200 counts under its error.",
    ),
    Spec(
        "trtllm_launch_in_flight_requests",
        "gauge",
        ("model",),
        "Requests accepted and not yet answered to the end.",
    ),
    Spec(
        "trtllm_launch_request_seconds",
        "histogram",
        ("endpoint", "model"),
        "From the request fully received to the last byte written.",
        _REQUEST_S,
    ),
    Spec(
        "trtllm_launch_time_to_first_token_seconds",
        "histogram",
        ("model",),
        "From the request fully received to the first non-empty token written.",
        _FIRST_TOKEN_S,
    ),
    Spec(
        "trtllm_launch_inter_token_latency_seconds",
        "histogram",
        ("model",),
        "Per request: (last token - first token) / (output tokens - 1); also known as TPOT.",
        _TOKEN_GAP_S,
    ),
    Spec(
        "trtllm_launch_prompt_tokens_total",
        "counter",
        ("model",),
        "Prompt tokens of accepted requests.",
    ),
    Spec(
        "trtllm_launch_image_items",
        "histogram",
        ("model",),
        "Images of a request that has any; a file of embeddings may hold several.",
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
    ),
    Spec(
        "trtllm_launch_image_cached_items_total",
        "counter",
        ("model",),
        "Images of requests that the worker that encodes had already.",
    ),
    Spec(
        "trtllm_launch_image_encode_seconds",
        "histogram",
        ("model", "outcome"),
        "From asking a worker for a request's images to its answer, other workers asked before included; "
        "outcome is ok, refused, failed or abandoned.",
        _REQUEST_S,
    ),
    Spec(
        "trtllm_launch_image_encode_retries_total",
        "counter",
        ("model",),
        "Times that another worker was asked for images because one was lost or could not.",
    ),
    Spec(
        "trtllm_launch_cached_prompt_tokens_total",
        "counter",
        ("model",),
        "Prompt tokens taken from a prefix cache; a part of the prompt tokens.",
    ),
    Spec(
        "trtllm_launch_output_tokens_total",
        "counter",
        ("model",),
        "Tokens generated, as billed in usage.",
    ),
    Spec(
        "trtllm_launch_aborted_requests_total",
        "counter",
        ("cause",),
        "Requests stopped before their end, by cause.",
    ),
    Spec(
        "trtllm_launch_worker_lost_total",
        "counter",
        (),
        "Connections to workers that ended while the ingress was using them.",
    ),
    Spec(
        "trtllm_launch_migrations_total",
        "counter",
        (),
        "Streams that went on at another worker after theirs was lost.",
    ),
    Spec(
        "trtllm_launch_sse_events_total",
        "counter",
        (),
        "Server-sent events written to clients.",
    ),
    Spec(
        "trtllm_launch_registered_workers",
        "gauge",
        ("model", "role", "state"),
        "Workers that discovery shows.",
    ),
    # The router of this ingress: its choices of workers that are registered now.
    Spec(
        "trtllm_launch_router_decisions_total",
        "counter",
        ("worker_id", "mode"),
        "Requests sent to a worker, by router mode; of a chain both workers count.",
    ),
    Spec(
        "trtllm_launch_router_placed_tokens_total",
        "counter",
        ("worker_id",),
        "Prompt tokens of those requests.",
    ),
    Spec(
        "trtllm_launch_router_overlap_tokens_total",
        "counter",
        ("worker_id",),
        "Of those, tokens that the router took for cached at the worker (mode kv).",
    ),
    Spec(
        "trtllm_launch_router_index_blocks",
        "gauge",
        ("worker_id",),
        "Cached KV blocks of the worker that the router knows from its events.",
    ),
    Spec(
        "trtllm_launch_router_resyncs_total",
        "counter",
        ("worker_id",),
        "Snapshots of a worker's cache asked for because KV events were lost.",
    ),
    Spec(
        "trtllm_launch_router_hit_ratio",
        "gauge",
        ("model",),
        "Overlap tokens over placed tokens, 0 to 1, of the workers that compute prompts.",
    ),
    # Written by a worker.
    Spec(
        "trtllm_launch_engine_running_requests",
        "gauge",
        ("worker_id",),
        "Requests in the engine's running batch.",
    ),
    Spec(
        "trtllm_launch_engine_waiting_requests",
        "gauge",
        ("worker_id",),
        "Requests the engine has accepted and not yet scheduled.",
    ),
    Spec(
        "trtllm_launch_engine_blocks",
        "gauge",
        ("worker_id", "state"),
        "KV blocks of the pool by state: free, cached or active.",
    ),
    Spec(
        "trtllm_launch_engine_steps_total",
        "counter",
        ("worker_id",),
        "Engine steps run.",
    ),
    Spec(
        "trtllm_launch_engine_preemptions_total",
        "counter",
        ("worker_id",),
        "Running requests whose blocks the scheduler took back.",
    ),
    Spec(
        "trtllm_launch_frames_sent_total",
        "counter",
        ("worker_id",),
        "Token frames sent to ingresses.",
    ),
    # Handoffs, as workers tell them. A worker of role prefill counts handoffs by their end, one of
    # role decode its pairs: label peer is the prefill worker.
    Spec(
        "trtllm_launch_handoff_blocks",
        "gauge",
        ("worker_id", "state"),
        "Active KV blocks that wait: pinned (to be fetched) or reserved (for KV to come).",
    ),
    Spec(
        "trtllm_launch_blocks_allocated_total",
        "counter",
        ("worker_id",),
        "KV blocks that requests came to hold.",
    ),
    Spec(
        "trtllm_launch_blocks_freed_total",
        "counter",
        ("worker_id",),
        "KV blocks that requests let go of; equal to those allocated when no request is left.",
    ),
    Spec(
        "trtllm_launch_leaked_blocks_total",
        "counter",
        ("worker_id",),
        "KV blocks held for requests that nobody stood for any more. Alarm when it is not 0.",
    ),
    Spec(
        "trtllm_launch_handoffs_total",
        "counter",
        ("worker_id", "state", "cause"),
        "Handoffs that reached a state (offered, fetching) or ended (released, expired), by cause.",
    ),
    Spec(
        "trtllm_launch_prefill_fallbacks_total",
        "counter",
        ("worker_id", "cause"),
        "Prompts that a decode worker computed itself because remote prefill did not work out.",
    ),
    Spec(
        "trtllm_launch_local_prefills_total",
        "counter",
        ("worker_id",),
        "Prompts that a decode worker computed itself because little of them was uncached.",
    ),
    Spec(
        "trtllm_launch_kv_transfers_total",
        "counter",
        ("worker_id", "peer", "transport", "wire"),
        "Handoffs whose blocks were read.",
    ),
    Spec(
        "trtllm_launch_kv_transfer_bytes_total",
        "counter",
        ("worker_id", "peer", "transport", "wire"),
        "Bytes of KV blocks read.",
    ),
    Spec(
        "trtllm_launch_kv_transfer_seconds_total",
        "counter",
        ("worker_id", "peer", "transport", "wire"),
        "Seconds that reading KV blocks took.",
    ),
    Spec(
        "trtllm_launch_kv_transfer_gigabytes_per_second",
        "gauge",
        ("worker_id", "peer", "transport", "wire"),
        "Rate of recent reads of KV blocks, 10^9 bytes a second.",
    ),
    Spec(
        "trtllm_launch_kv_pairs",
        "gauge",
        ("worker_id", "peer", "state"),
        "1 for the state a pair is in: checking, ready, refused, mismatch or lost.",
    ),
    Spec(
        "trtllm_launch_canary_total",
        "counter",
        ("worker_id", "peer", "result"),
        "Correctness probes of a pair: passed, mismatch (wrong tokens) or failed (not through).",
    ),
    Spec(
        "trtllm_launch_first_token_phase_seconds",
        "histogram",
        ("model", "phase"),
        "Parts of a disaggregated first token: queue, prefill, transfer, first_decode.",
        _FIRST_TOKEN_S,
    ),
    # Of the prefill queue; only where there is one.
    Spec(
        "trtllm_launch_prefill_queue_requests",
        "gauge",
        ("worker_id",),
        "Prompts in the prefill queue, waiting or worked on, as this decode worker saw it last.",
    ),
    Spec(
        "trtllm_launch_prefill_queue_jobs_total",
        "counter",
        ("worker_id", "outcome"),
        "What became of prompts for the queue: filled; lost or given_back by a taker; or a fallback's cause.",
    ),
    Spec(
        "trtllm_launch_prefill_queue_redelivered_total",
        "counter",
        ("worker_id",),
        "Prompts that this prefill worker took from the queue after somebody else had.",
    ),
    Spec(
        "trtllm_launch_prefill_queue_seconds",
        "histogram",
        ("model",),
        "From putting a prompt into the queue to a prefill worker beginning it.",
        _FIRST_TOKEN_S,
    ),
    # Images; only of workers whose engine takes them. Label peer is the worker that had the bytes.
    Spec(
        "trtllm_launch_media_items_total",
        "counter",
        ("worker_id", "source"),
        "Images made ready: encoded by the vision tower, taken from a file of embeddings, or cached.",
    ),
    Spec(
        "trtllm_launch_media_encode_seconds_total",
        "counter",
        ("worker_id",),
        "Seconds that the vision tower was busy.",
    ),
    Spec(
        "trtllm_launch_media_failures_total",
        "counter",
        ("worker_id", "work", "code"),
        "Images that came to nothing, by work (encode or fetch) and error code.",
    ),
    Spec(
        "trtllm_launch_media_lookups_total",
        "counter",
        ("worker_id", "result"),
        "Images of prompts to be computed: hit (their embeddings were here) or miss (fetched).",
    ),
    Spec(
        "trtllm_launch_media_fetches_total",
        "counter",
        ("worker_id", "peer", "transport", "wire"),
        "Reads of embeddings from other workers.",
    ),
    Spec(
        "trtllm_launch_media_fetch_bytes_total",
        "counter",
        ("worker_id", "peer", "transport", "wire"),
        "Bytes of embeddings read.",
    ),
    Spec(
        "trtllm_launch_media_fetch_seconds_total",
        "counter",
        ("worker_id", "peer", "transport", "wire"),
        "Seconds that reading embeddings took.",
    ),
    Spec(
        "trtllm_launch_media_kept_images",
        "gauge",
        ("worker_id", "state"),
        "Images whose embeddings the worker has: pinned (in use) or cached (may go).",
    ),
    Spec(
        "trtllm_launch_media_memory_bytes",
        "gauge",
        ("worker_id", "state"),
        "Memory for embeddings that is free, or claimed (being filled).",
    ),
)

"""What workers tell of images is on /metrics."""

from __future__ import annotations

from trtllm_workers.ingress.handoff_meters import show_handoffs
from trtllm_workers.observe.metrics import Metrics
from trtllm_workers.planes.frames import Decoder, encode
from trtllm_workers.planes.media_messages import MediaFlow, MediaStats
from trtllm_workers.planes.messages import WorkerStats
from trtllm_workers.types import EngineStats


def shown(media: MediaStats | None) -> list[str]:
    told = WorkerStats("p0", EngineStats(), 0, media=media)
    (arrived,) = Decoder().feed(encode(told))
    assert isinstance(arrived, WorkerStats)
    metrics = Metrics(process=False)
    for _ in range(2):  # counts are totals: shown twice they are the same
        show_handoffs(metrics, arrived)
    lines = metrics.render().decode().splitlines()
    return [line for line in lines if line.startswith("trtllm_launch_media")]


def test_what_a_worker_says_of_images_is_shown() -> None:
    lines = shown(
        MediaStats(
            items=[("encoded", 3), ("cached", 2)],
            encode_seconds=1.5,
            failures=[("encode", "invalid_image", 1), ("fetch", "media_gone", 2)],
            num_hits=4,
            num_misses=5,
            flows=[MediaFlow("e0", "ucx", "shm", 6, 4096, 0.25)],
            num_kept=7,
            num_pinned=3,
            free_bytes=100,
            claimed_bytes=10,
        )
    )
    peer = 'peer="e0",transport="ucx",wire="shm",worker_id="p0"'
    for line in (
        'trtllm_launch_media_items_total{source="encoded",worker_id="p0"} 3.0',
        'trtllm_launch_media_items_total{source="cached",worker_id="p0"} 2.0',
        'trtllm_launch_media_encode_seconds_total{worker_id="p0"} 1.5',
        'trtllm_launch_media_failures_total{code="invalid_image",work="encode",worker_id="p0"} 1.0',
        'trtllm_launch_media_failures_total{code="media_gone",work="fetch",worker_id="p0"} 2.0',
        'trtllm_launch_media_lookups_total{result="hit",worker_id="p0"} 4.0',
        'trtllm_launch_media_lookups_total{result="miss",worker_id="p0"} 5.0',
        f"trtllm_launch_media_fetches_total{{{peer}}} 6.0",
        f"trtllm_launch_media_fetch_bytes_total{{{peer}}} 4096.0",
        f"trtllm_launch_media_fetch_seconds_total{{{peer}}} 0.25",
        'trtllm_launch_media_kept_images{state="pinned",worker_id="p0"} 3.0',
        'trtllm_launch_media_kept_images{state="cached",worker_id="p0"} 4.0',
        'trtllm_launch_media_memory_bytes{state="free",worker_id="p0"} 100.0',
        'trtllm_launch_media_memory_bytes{state="claimed",worker_id="p0"} 10.0',
    ):
        assert line in lines, (line, lines)


def test_a_worker_of_text_shows_nothing_of_images() -> None:
    assert shown(None) == []

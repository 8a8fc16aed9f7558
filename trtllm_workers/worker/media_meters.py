"""What a worker counts about images. Knows no message but the one that tells the counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from trtllm_workers.planes.media_messages import MediaFlow, MediaStats
from trtllm_workers.transfer.media_store import MediaStore

# How items came to be.
ENCODED, TAKEN, CACHED = "encoded", "taken", "cached"
# Which work failed.
ENCODE, FETCH = "encode", "fetch"


@dataclass(slots=True)
class _Flow:
    num_fetches: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class MediaMeters:
    """Counts items by how they came to be, failures by code, and what was fetched from whom."""

    def __init__(self) -> None:
        self.encode_seconds = 0.0
        self.num_hits = 0
        self.num_misses = 0
        self._items: Counter[str] = Counter()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._flows: dict[tuple[str, str, str], _Flow] = {}

    def made(self, how: str) -> None:
        """Count one item that an ingress asked for."""
        self._items[how] += 1

    def failed(self, what: str, code: str) -> None:
        """Count one ask or fetch that came to nothing."""
        self._failures[what, code] += 1

    def fetched(self, peer: str, transport: str, wire: str, num_bytes: int, seconds: float) -> None:
        """Count bytes that were read from another worker."""
        flow = self._flows.setdefault((peer, transport, wire), _Flow())
        flow.num_fetches += 1
        flow.num_bytes += num_bytes
        flow.seconds += seconds

    def stats(self, store: MediaStore) -> MediaStats:
        """Return the counts, and what the store holds now."""
        return MediaStats(
            items=list(self._items.items()),
            encode_seconds=self.encode_seconds,
            failures=[(what, code, count) for (what, code), count in self._failures.items()],
            num_hits=self.num_hits,
            num_misses=self.num_misses,
            flows=[
                MediaFlow(peer, transport, wire, flow.num_fetches, flow.num_bytes, flow.seconds)
                for (peer, transport, wire), flow in self._flows.items()
            ],
            num_kept=store.num_entries,
            num_pinned=store.num_pinned,
            free_bytes=store.num_free_blocks * store.block_bytes,
            claimed_bytes=store.num_claimed_blocks * store.block_bytes,
        )

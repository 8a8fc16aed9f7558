"""What a worker counts about handoffs. Knows no message but the one that tells the counts."""

from __future__ import annotations

from collections import Counter

import msgspec

from trtllm_workers.planes.messages import HandoffStats

# Between two reports of a second each; a report that nobody takes must not grow without end.
_MAX_PHASES = 4096


class HandoffMeters:
    """Counts handoffs by end and cause, fallbacks by cause, and the phases of first tokens."""

    def __init__(self) -> None:
        self.offered = 0
        self.fetching = 0
        self.local = 0
        self.leaked_blocks = 0
        self._ended: Counter[tuple[str, str]] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._phases: list[tuple[float, float, float, float]] = []
        self.filled = 0
        self.redelivered = 0
        self.queue_depth = -1
        self._queue_jobs: Counter[str] = Counter()
        self._queue_waits: list[float] = []

    def ended(self, state: str, cause: str) -> None:
        """Count one handoff that ended."""
        self._ended[state, cause] += 1

    def fell_back(self, cause: str) -> None:
        """Count one prompt computed locally because its remote prefill did not work out."""
        self._fallbacks[cause] += 1

    def first_token(
        self, queue_s: float, prefill_s: float, transfer_s: float, first_decode_s: float
    ) -> None:
        """Note what the time to a first token was spent on, in seconds."""
        if len(self._phases) < _MAX_PHASES:
            self._phases.append((queue_s, prefill_s, transfer_s, first_decode_s))

    def queue_job(self, outcome: str) -> None:
        """Count one thing that became of a job of the prefill queue."""
        self._queue_jobs[outcome] += 1

    def queue_wait(self, seconds: float) -> None:
        """Note how long a job waited until a prefill worker was given leave to do it."""
        if len(self._queue_waits) < _MAX_PHASES:
            self._queue_waits.append(seconds)

    def take(self) -> HandoffStats:
        """Return the counts; the phases in them are not returned again."""
        phases, self._phases = self._phases, []
        waits, self._queue_waits = self._queue_waits, []
        return msgspec.structs.replace(self.counts(), phases=phases, queue_waits=waits)

    def counts(self) -> HandoffStats:
        """Return the counts without the phases."""
        return HandoffStats(
            offered=self.offered,
            fetching=self.fetching,
            ended=[(state, cause, count) for (state, cause), count in self._ended.items()],
            fallbacks=list(self._fallbacks.items()),
            local=self.local,
            leaked_blocks=self.leaked_blocks,
            queue_jobs=list(self._queue_jobs.items()),
            redelivered=self.redelivered,
            queue_depth=self.queue_depth,
        )

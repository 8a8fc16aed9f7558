"""One request's KV blocks on their way from a prefill worker to a decode worker. Pure: no clock,
no socket; the caller brings the time.

::

    OFFERED ──fetch──▶ FETCHING ──▶ RELEASED
       │                  │
       └──deadline────────┴──────▶ EXPIRED

The prefill worker pins the blocks while a handoff is OFFERED or FETCHING, so the engine cannot
evict them under the transport. Both ends hold the same deadline; neither waits without one. The
decode worker uses what it has read only after the prefill worker has said that the pins held to the
end: clocks of two hosts, a process that stood still or a peer that was restarted cannot make it
read somebody else's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from trtllm_workers.errors import HandoffExpired

# A transfer may be so much slower than measured before it counts as stuck: other transfers share
# the wire and the memory.
_SLOWDOWN = 10.0
_TELLING_BYTES = 1 << 20
_NEWEST_WEIGHT = 0.3


class HandoffState(StrEnum):
    """Where a handoff is. RELEASED and EXPIRED are ends."""

    OFFERED = "offered"
    FETCHING = "fetching"
    RELEASED = "released"
    EXPIRED = "expired"


def handoff_timeout_s(
    num_bytes: int, bytes_per_s: float, *, min_timeout_s: float, max_timeout_s: float
) -> float:
    """Return how long both ends wait for ``num_bytes``, at a measured rate (0: not known).

    The shortest time plus ten times what the transfer should take, at most ``max_timeout_s``.
    """
    expected_s = num_bytes / bytes_per_s if bytes_per_s > 0 else 0.0
    return min(min_timeout_s + _SLOWDOWN * expected_s, max_timeout_s)


@dataclass(slots=True)
class Rate:
    """How fast blocks move between two workers, in bytes per second: a mean that follows recent transfers.

    Small transfers show latency rather than a rate; they count only until a large one has come.
    """

    bytes_per_s: float = 0.0
    telling: bool = False

    def note(self, num_bytes: int, seconds: float) -> None:
        """Take one transfer into account."""
        telling = num_bytes >= _TELLING_BYTES
        if seconds <= 0 or (self.telling and not telling):
            return
        rate = num_bytes / seconds
        if telling and not self.telling:
            self.telling, self.bytes_per_s = True, rate
        else:
            known = self.bytes_per_s or rate
            self.bytes_per_s = known + _NEWEST_WEIGHT * (rate - known)


@dataclass(slots=True)
class Handoff:
    """The prefill worker's side of one handoff; times in seconds of one monotonic clock.

    ``cause`` says why it ended: fetched, cancelled by decode (with its reason), peer lost, deadline.
    """

    handoff_id: str
    peer: str
    num_blocks: int
    num_bytes: int
    offered_s: float
    timeout_s: float
    state: HandoffState = HandoffState.OFFERED
    cause: str = ""

    @property
    def deadline_s(self) -> float:
        """When the pins end at the latest."""
        return self.offered_s + self.timeout_s

    @property
    def pinned(self) -> bool:
        """Whether the blocks are held."""
        return self.state in (HandoffState.OFFERED, HandoffState.FETCHING)

    def fetch(self, now_s: float) -> None:
        """Note that decode has begun to read. Raises HandoffExpired when it is too late."""
        if not self.pinned or now_s >= self.deadline_s:
            self.expire(now_s)
            raise self.expired(now_s)
        self.state = HandoffState.FETCHING

    def release(self, cause: str) -> bool:
        """End the handoff; True when the pins had held until now."""
        held = self.pinned
        if held:
            self.state = HandoffState.RELEASED
            self.cause = cause
        return held

    def expire(self, now_s: float) -> bool:
        """End the handoff if its deadline is over and it is still open; True when that was so."""
        if not self.pinned or now_s < self.deadline_s:
            return False
        self.state = HandoffState.EXPIRED
        self.cause = "deadline"
        return True

    def expired(self, now_s: float) -> HandoffExpired:
        """Return the error that tells what was not fetched in time."""
        return HandoffExpired(
            f"handoff {self.handoff_id}: {self.num_blocks} KV blocks waited "
            f"{now_s - self.offered_s:.1f} s for decode worker {self.peer} and were released; is it "
            "up, and has it free blocks? Raise --handoff-min-timeout-s if its queue is long"
        )

"""How many threads compute while others want the cores too. Knows no model; results do not change.

Threads that compute a product together wait for each other by spinning. On a busy host one of them
regularly loses its core to somebody else, and all wait for it: a step that takes 14 ms on two free
cores takes 20 with one thread and up to 600 with two threads that get one core between them.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

WINDOW_S = 0.25
# Contended is when both hold, per second of stepping. CPU time of the process over its threads:
# waiting threads spin, so it is 0.99 with free cores, about 0.5 where two threads get one core, and
# something between where OpenMP was told to wait asleep. Involuntary context switches: 30 to 160
# with free cores, 200 to 800 with one core too few.
LEAST_SHARE = 0.75
MOST_SWITCHES_PER_S = 180.0
SHORTEST_HOLD_S = 2.0
LONGEST_HOLD_S = 60.0


def involuntary_switches() -> float:
    """Return how often a thread of this process lost its core though it wanted to go on."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


class ThreadGovernor:
    """Goes down to one thread when cores are contended, and tries all again after a while.

    ::

        all ───── contended for a whole window ─────▶ one
         ▲                                             │
         └───── after the hold, which doubles each time ┘  and is short again after a good window
    """

    def __init__(
        self,
        num_threads: int,
        set_threads: Callable[[int], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_time: Callable[[], float] = time.process_time,
        switches: Callable[[], float] = involuntary_switches,
    ) -> None:
        self._num_threads = num_threads
        self._set_threads = set_threads
        self._clock = clock
        self._cpu_time = cpu_time
        self._switches = switches
        self._hold_s = SHORTEST_HOLD_S
        self._one_until_s: float | None = None
        self._began = (0.0, 0.0, 0.0)
        self._busy_s = self._cpu_s = self._num_switches = 0.0

    def before_step(self) -> None:
        """Note the time; between steps the engine may be idle, which says nothing of the cores."""
        self._began = (self._clock(), self._cpu_time(), self._switches())

    def after_step(self) -> None:
        """Add the step to its window, and decide when that is full."""
        if self._num_threads == 1:
            return
        now_s = self._clock()
        if self._one_until_s is not None:
            if now_s >= self._one_until_s:
                self._one_until_s = None
                self._set_threads(self._num_threads)
            return
        self._busy_s += now_s - self._began[0]
        self._cpu_s += self._cpu_time() - self._began[1]
        self._num_switches += self._switches() - self._began[2]
        if self._busy_s < WINDOW_S:
            return
        if (
            self._cpu_s < LEAST_SHARE * self._num_threads * self._busy_s
            and self._num_switches > MOST_SWITCHES_PER_S * self._busy_s
        ):
            self._set_threads(1)
            self._one_until_s = now_s + self._hold_s
            self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S)
        else:
            self._hold_s = SHORTEST_HOLD_S
        self._busy_s = self._cpu_s = self._num_switches = 0.0

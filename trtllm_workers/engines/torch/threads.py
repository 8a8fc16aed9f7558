"""How many threads compute while others want the cores too. Knows no model; results do not change.

Threads that compute a product together wait for each other by spinning. On a busy host one of them
regularly loses its core to somebody else, and all wait for it: a step that takes 14 ms on two free
cores takes 20 with one thread and up to 600 with two threads that get one core between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WINDOW_S = 0.25
# CPU time the process got while stepping, per second and thread. Waiting threads spin, so with free
# cores it is 1.0 whatever is computed (measured 0.99), and about 0.5 where two threads get one core.
LEAST_SHARE = 0.75
SHORTEST_HOLD_S = 2.0
LONGEST_HOLD_S = 60.0


class ThreadGovernor:
    """Goes down to one thread when cores are contended, and tries all again after a while.

    ::

        all ──share under LEAST_SHARE for a window──▶ one
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
    ) -> None:
        self._num_threads = num_threads
        self._set_threads = set_threads
        self._clock = clock
        self._cpu_time = cpu_time
        self._hold_s = SHORTEST_HOLD_S
        self._one_until_s: float | None = None
        self._began = (0.0, 0.0)
        self._busy_s = self._cpu_s = 0.0

    def before_step(self) -> None:
        """Note the time; between steps the engine may be idle, which says nothing of the cores."""
        self._began = (self._clock(), self._cpu_time())

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
        if self._busy_s < WINDOW_S:
            return
        if self._cpu_s < LEAST_SHARE * self._num_threads * self._busy_s:
            self._set_threads(1)
            self._one_until_s = now_s + self._hold_s
            self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S)
        else:
            self._hold_s = SHORTEST_HOLD_S
        self._busy_s = self._cpu_s = 0.0

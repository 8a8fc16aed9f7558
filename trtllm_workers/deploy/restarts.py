"""When a worker that died is started again, and when that has happened too often. Pure."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_S = 600.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, slots=True)
class Restart:
    """One start after a death: the ``number``-th of at most ``limit`` in a window, after ``pause_s``."""

    number: int
    limit: int
    pause_s: float

    def __str__(self) -> str:
        return f"restart {self.number} of {self.limit} within {WINDOW_S / 60:.0f} minutes"


class Restarts:
    """Counts each process's deaths; the caller brings the time.

    Within any ten minutes a process is started again at most ``limit`` times. The pause before each start
    doubles with the starts of that window, so that a worker that dies at once does not keep a host busy.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._starts: dict[str, list[float]] = {}
        self._totals: dict[str, int] = {}

    def after_death(self, name: str, now_s: float) -> Restart | None:
        """Return the start that answers this death, None when there is none left."""
        recent = [at for at in self._starts.get(name, []) if now_s - at < WINDOW_S]
        self._starts[name] = recent
        if len(recent) >= self.limit:
            return None
        recent.append(now_s)
        self._totals[name] = self.total(name) + 1
        # The exponent is bounded because a float's is.
        pause_s = _FIRST_PAUSE_S * 2 ** min(len(recent) - 1, 10)
        return Restart(len(recent), self.limit, min(pause_s, _LONGEST_PAUSE_S))

    def total(self, name: str) -> int:
        """Return how often the process was started again since the run began."""
        return self._totals.get(name, 0)

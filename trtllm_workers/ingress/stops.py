"""Finds stop strings across token borders. Knows characters, no tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Lets text through until a stop string completes; holds back what could begin one.

    Text passed on never contains any part of a match. The result does not depend on how the text
    was cut: the stop string that completes first wins, of those the longest.
    """

    __slots__ = ("_include", "_longest", "_stops", "held")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops))
        self._include = include
        self.held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Return the text that may go out now, and the stop string that completed, if any.

        After a match nothing more may be fed. With ``include`` the match itself goes out too.
        """
        text = self.held + text
        match = self._first_match(text)
        if match is not None:
            start, stop = match
            self.held = ""
            return text[: start + len(stop) if self._include else start], stop
        keep = self._possible_beginning(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """End the text: what was held back began no stop string after all."""
        held, self.held = self.held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(text.find(stop), stop) for stop in self._stops]
        complete = [(at + len(stop), at, stop) for at, stop in found if at >= 0]
        if not complete:
            return None
        _end, start, stop = min(complete)
        return start, stop

    def _possible_beginning(self, text: str) -> int:
        """Return the length of the longest suffix with which a stop string could begin."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = text[len(text) - length :]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0

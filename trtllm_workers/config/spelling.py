"""Nearest names for misspelt ones. Knows no file, flag or variable."""

from __future__ import annotations

from collections.abc import Iterable

_SHORTEST_BEGINNING = 3


def edit_distance(a: str, b: str) -> int:
    """Return how many insertions, deletions, substitutions and swaps of neighbours make b of a."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (char != other))
            if i > 1 and j > 1 and char == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def nearest(word: str, candidates: Iterable[str], limit: int | None = None) -> str | None:
    """Return the candidate nearest to ``word`` within ``limit`` edits, case ignored; else None.

    Without a limit a third of the word may differ, at most four characters, or the word may be the
    beginning of a candidate (``warn`` of ``warning``). Ties go to the first in alphabetical order,
    so messages are stable.
    """
    allowed = min(4, len(word) // 3) if limit is None else limit
    candidates = sorted(candidates)
    folded = word.casefold()
    best: tuple[int, str] | None = None
    for candidate in candidates:
        if abs(len(candidate) - len(word)) > allowed:
            continue
        distance = edit_distance(folded, candidate.casefold())
        if distance <= allowed and (best is None or distance < best[0]):
            best = (distance, candidate)
    if best is None and limit is None and len(word) >= _SHORTEST_BEGINNING:
        return min((one for one in candidates if one.casefold().startswith(folded)), default=None)
    return best[1] if best else None

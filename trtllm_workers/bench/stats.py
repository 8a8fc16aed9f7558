"""Percentiles with their sample size, and whether two samples differ by more than chance. Knows no unit."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

# A percentile needs some samples beyond it: one in a hundred says nothing below a hundred.
_NEEDED = {90: 10, 99: 100}
# Two starts of one deployment differ by so much, however even the requests of each are.
NEGLIGIBLE = 0.01
_RESAMPLES = 1000
_CONFIDENCE = 0.95
# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the last the normal one's.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
_T_BEYOND = 2.0


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a sample: ``n`` and, of an empty one, nothing else.

    ``p90`` is None below 10 samples, ``p99`` below 100.
    """

    n: int = 0
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    min: float | None = None
    max: float | None = None


def distribution(values: Sequence[float]) -> Distribution:
    """Return what is told of ``values``."""
    if not values:
        return Distribution()
    array = np.asarray(values, dtype=float)
    return Distribution(
        n=len(values),
        mean=float(array.mean()),
        p50=percentile(values, 50),
        p90=percentile(values, 90),
        p99=percentile(values, 99),
        min=float(array.min()),
        max=float(array.max()),
    )


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Return a percentile, between two samples in proportion; None for too small a sample."""
    if len(values) < _NEEDED.get(percent, 1):
        return None
    return float(np.percentile(np.asarray(values, dtype=float), percent))


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """From one figure to another, as a share of the first: +0.1 is 10 % more.

    ``low`` and ``high`` bound it at 95 %; where they cannot be told, ``certain`` is False.
    """

    before: float
    after: float
    share: float
    low: float | None = None
    high: float | None = None

    @property
    def certain(self) -> bool:
        """True when chance is no good explanation, and the change is worth speaking of."""
        if self.low is None or self.high is None or abs(self.share) < NEGLIGIBLE:
            return False
        return self.low > 0 or self.high < 0


def bootstrap_change(
    before: Sequence[float], after: Sequence[float], percent: int | None, seed: int = 0
) -> Change | None:
    """Return the change of a percentile (None: of the mean) from one sample to another.

    The bounds come from drawing both samples again and again with replacement: they hold what lies
    in the samples, not what differs from one start of a deployment to the next. None when a sample is
    too small for the percentile, or is nothing but zeros.
    """
    needed = 2 if percent is None else max(2, _NEEDED.get(percent, 2))
    if len(before) < needed or len(after) < needed:
        return None
    one, other = np.asarray(before, dtype=float), np.asarray(after, dtype=float)

    def figure(sample: NDArray[np.float64]) -> NDArray[np.float64]:
        if percent is None:
            return np.asarray(sample.mean(axis=-1))
        return np.asarray(np.percentile(sample, percent, axis=-1))

    first, second = float(figure(one)), float(figure(other))
    if first <= 0:
        return None
    dice = np.random.default_rng(seed)
    drawn_one = figure(dice.choice(one, (_RESAMPLES, len(one))))
    drawn_other = figure(dice.choice(other, (_RESAMPLES, len(other))))
    shares = drawn_other / np.maximum(drawn_one, 1e-12) - 1
    tail = (1 - _CONFIDENCE) / 2 * 100
    return Change(
        before=first,
        after=second,
        share=second / first - 1,
        low=float(np.percentile(shares, tail)),
        high=float(np.percentile(shares, 100 - tail)),
    )


def paired_change(before: Sequence[float], after: Sequence[float]) -> Change | None:
    """Return the change from rounds of one kind to rounds of another, taken in pairs.

    Bounds by Student's t over the logarithms of the pairs' ratios, so that what slows a machine for both
    of a pair does not count; None of them with a single pair. None when a round has no figure.
    """
    if not before or len(before) != len(after) or min(*before, *after) <= 0:
        return None
    ratios = np.log(np.asarray(after, dtype=float) / np.asarray(before, dtype=float))
    middle = float(ratios.mean())
    low = high = None
    if len(ratios) > 1:
        freedom = len(ratios) - 1
        t = _T[freedom - 1] if freedom <= len(_T) else _T_BEYOND
        half = t * float(ratios.std(ddof=1)) / len(ratios) ** 0.5
        low, high = float(np.expm1(middle - half)), float(np.expm1(middle + half))
    return Change(
        before=float(np.exp(np.log(np.asarray(before, dtype=float)).mean())),
        after=float(np.exp(np.log(np.asarray(after, dtype=float)).mean())),
        share=float(np.expm1(middle)),
        low=low,
        high=high,
    )

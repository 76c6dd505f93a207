"""Confidence intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["Interval", "proportion_interval"]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def proportion_interval(share: float, samples: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's interval of a share, such as an accuracy (`scipy.stats.binomtest`).

    Unlike a bootstrap's it has a width where all samples agree, as in small groups.

    Parameters
    ----------
    share
        In [0, 1].
    samples
        What it is a share of; NaN both ends for 0.
    confidence
        Its coverage.
    """
    if not samples:
        return Interval(math.nan, math.nan)
    from scipy import stats

    found = stats.binomtest(round(share * samples), samples)
    low, high = found.proportion_ci(confidence, method="wilson")
    return Interval(float(low), float(high))

"""Median of paired ratios with an interval that assumes nothing of how they are distributed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

TAIL = 0.025


@dataclass(frozen=True)
class MedianRatio:
    """The median lies from ``low`` to ``high`` in 95 of 100 samples; None of fewer than six pairs."""

    median: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.median:.3f} ({self.pairs} pairs, too few for an interval)"
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.pairs} pairs)"


def median_ratio(pairs: Sequence[tuple[float, float]]) -> MedianRatio:
    """Of second to first of each pair; seconds, or whatever both are measured in.

    A sample's k-th smallest value lies above the median with the probability that fewer than k of n
    fair coins show heads (the sign test turned round). Outliers, which a shared machine makes, move
    the ends by one rank at most.
    """
    ratios = sorted(second / first for first, second in pairs)
    rank = tail_rank(len(ratios))
    low, high = (ratios[rank - 1], ratios[-rank]) if rank else (None, None)
    return MedianRatio(statistics.median(ratios), low, high, len(ratios))


def tail_rank(count: int) -> int:
    """The greatest k with P(Binomial(count, 1/2) < k) <= 2.5 %; 0 where there is none."""
    below, rank = 0.0, 0
    while rank < count:
        below += math.comb(count, rank) / 2**count
        if below > TAIL:
            break
        rank += 1
    return rank

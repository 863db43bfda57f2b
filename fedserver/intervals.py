"""Means of a few seeds with Student's t intervals: three runs say little, and how little."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Estimate:
    """A mean and the half-width of its interval; None where one value allows no interval."""

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float:
        """Lower end; the mean itself without an interval."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end; the mean itself without an interval."""
        return self.mean + (self.half_width or 0.0)


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Mean and t interval of independent values; None without any."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, t_quantile(count - 1, confidence) * math.sqrt(variance / count), count)


@cache
def t_quantile(degrees: int, confidence: float = 0.95) -> float:
    """The two-sided quantile: P(|T| <= t) = ``confidence`` with ``degrees`` of freedom.

    Bisection on the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and
    26.7.4); agrees with tables to 1e-9.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(f"no t quantile for {degrees} degrees of freedom at {confidence}")
    low, high = 0.0, 1.0
    while _central_probability(high, degrees) < confidence:
        low, high = high, high * 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _central_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _central_probability(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for index in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (index - 1) / index
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total

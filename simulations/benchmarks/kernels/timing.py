"""How long calls take on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Call = Callable[[], object]


def median_seconds(*calls: Call, repeats: int = 7) -> list[float]:
    """Return the median time of each call, all called in turn so that they meet the same load."""
    return [statistics.median(taken) for taken in _times(calls, repeats)]


def least_seconds(*calls: Call, repeats: int = 7) -> list[float]:
    """Return the shortest time of each call: what the machine can do when it is left alone.

    On a machine that is busier than it has processors, medians measure what else it does.
    """
    return [min(taken) for taken in _times(calls, repeats)]


def _times(calls: tuple[Call, ...], repeats: int) -> list[list[float]]:
    """Time every call `repeats` times, in turn; each is made once beforehand, untimed.

    The first call loads code and touches memory for the first time.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return times

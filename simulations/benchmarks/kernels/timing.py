"""How long calls take on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_seconds(*calls: Callable[[], object], repeats: int = 7) -> list[float]:
    """Return the median time of each call, all called in turn so that they meet the same load.

    Every call is made once beforehand, untimed: it loads code and touches memory.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in times]


def least_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest of several times: what the machine can do when it is left alone."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)

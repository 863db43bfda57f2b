"""How long calls take on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable


def least_seconds(*calls: Callable[[], object], repeats: int = 7) -> list[float]:
    """Return the shortest time of each call, all called in turn so that they meet the same load.

    The shortest is what the machine does when it is left alone; means and medians also measure what
    else it is doing. Every call is made once beforehand, untimed: it loads code, touches memory.
    """
    for call in calls:
        call()
    least = [float("inf")] * len(calls)
    for _ in range(repeats):
        for position, call in enumerate(calls):
            started = time.perf_counter()
            call()
            least[position] = min(least[position], time.perf_counter() - started)
    return least

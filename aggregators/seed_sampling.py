"""Which seeds of a pool a step draws: uniformly, or by what was measured along them.

FedKSeed-Pro (Qin et al., 2024, equation 8): p = softmax(minmax(mean |g|)). A level in [0, 255] is the
minmax of a seed in 255 steps (``SeedStatistics.levels``), so a seed's share is exp(level / 255). Draws
are whole numbers from the probes' own generator and a table that no math library makes, hence the same
on every device.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Iterator
from decimal import Context, Decimal

import fedkernels as fk
from aggregators.seed_statistics import TOP_LEVEL

WEIGHT_BITS = 20


def drawn_indices(seed: int, pool_size: int, levels: bytes | None = None) -> Iterator[int]:
    """Pool indices without end, independent: functions of ``seed`` and ``levels`` alone.

    ``levels``: one of each seed of the pool; None: all are drawn alike. That a sum of weights does not
    divide 2**63 favours an index by less than 1e-5 of its share.
    """
    numbers = (fk.derive_seed(seed, count) for count in itertools.count())
    if levels is None:
        yield from (number % pool_size for number in numbers)
        return
    if len(levels) != pool_size:
        raise ValueError(f"{len(levels)} levels for a pool of {pool_size} seeds")
    ends = list(itertools.accumulate(weights(levels)))
    for number in numbers:
        yield bisect_right(ends, number % ends[-1])


def weights(levels: bytes) -> list[int]:
    """Whole numbers in the proportions of the seeds' probabilities."""
    table = _table()
    return [table[level] for level in levels]


def probabilities(levels: bytes) -> list[float]:
    """How likely a single draw is each seed of the pool."""
    found = weights(levels)
    total = sum(found)
    return [weight / total for weight in found]


@functools.cache
def _table() -> list[int]:
    context = Context(prec=30)
    return [
        round(context.exp(Decimal(level) / TOP_LEVEL) * (1 << WEIGHT_BITS))
        for level in range(TOP_LEVEL + 1)
    ]

"""The wire form of seed statistics: a byte or so a seed for the mean |g|, about a bit for the count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from aggregators.index_coding import decode_indices, encode_indices
from aggregators.seed_statistics import LARGEST_COUNT, STEPS, SeedStatistics

WHOLE = 8  # bytes of a sum that is kept exactly
CODES = 255


def statistics_parts(statistics: SeedStatistics, whole: bool) -> tuple[list[Any], bytes]:
    """Header and bytes. Sums are kept ``whole``, or as means in 255 steps of the largest one.

    Probabilities are no finer than that (``seed_sampling``). Counts are coded as gaps.
    """
    sums, counts = statistics.sums.tolist(), statistics.counts.tolist()
    largest = max(
        (-(-total // count) for total, count in zip(sums, counts, strict=True) if count), default=0
    )
    if whole:
        coded = b"".join(total.to_bytes(WHOLE, "little") for total in sums)
    else:
        coded = bytes(
            round(total * CODES / (largest * count)) if total else 0
            for total, count in zip(sums, counts, strict=True)
        )
    ends = [end - 1 for end in accumulate(count + 1 for count in counts)]
    return [statistics.bound, WHOLE if whole else 1, largest], coded + encode_indices(ends)


def read_statistics(
    header: Any, data: bytes, pool_size: int, indices: Sequence[int]
) -> SeedStatistics:
    """What ``statistics_parts`` wrote, of the seeds ``indices``. ValueError for anything else."""
    if not isinstance(header, list) or len(header) != 3:
        raise ValueError("statistics need a bound, a width and a largest mean")
    bound, width, largest = header
    if type(bound) is not float or width not in (1, WHOLE) or type(largest) is not int:
        raise ValueError("statistics need a bound, a width and a largest mean")
    if not 0 <= largest <= STEPS:
        raise ValueError(f"the largest mean of statistics is not in [0, {STEPS}]")
    count = len(indices)
    if len(data) <= count * width:
        raise ValueError("statistics end before their counts")
    coded, rest = data[: count * width], data[count * width :]
    ends = decode_indices(rest, count, LARGEST_COUNT)
    counts = [end - before - 1 for before, end in zip([-1, *ends], ends, strict=False)]
    if width == WHOLE:
        sums = [int.from_bytes(coded[i : i + WHOLE], "little") for i in range(0, len(coded), WHOLE)]
        if any(total > LARGEST_COUNT * STEPS for total in sums):
            raise ValueError("a sum of |g| is out of range")
    else:
        sums = [
            (2 * code * largest * n + CODES) // (2 * CODES)
            for code, n in zip(coded, counts, strict=True)
        ]
    return SeedStatistics(bound, pool_size, torch.tensor(list(indices)), sums, counts)

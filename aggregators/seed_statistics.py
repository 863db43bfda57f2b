"""What was measured along the seeds of a pool: the sum of |g| and how often, by seed. It only adds.

FedKSeed-Pro (Qin et al., 2024, section 4.3) draws seeds by the mean of |g| along them, g cut to a bound.
Means do not add, sums and counts do; both are whole numbers here, so that the order never matters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# Steps of the bound that one |g| is rounded to: a millionth of it.
STEPS = 1 << 20
LARGEST_COUNT = 1 << 40
TOP_LEVEL = 255


class SeedStatistics:
    """Of seed ``indices[j]``: ``counts[j]`` measurements, whose |g| sum to sums[j] * bound / STEPS.

    indices: int64 [n], ascending, in [0, pool_size); sums, counts: int64 [n], sums at most ``STEPS`` a
    measurement. ``bound``: what g was cut to. Immutable. Raises ValueError for anything else.
    """

    def __init__(
        self,
        bound: float,
        pool_size: int,
        indices: Iterable[int] | Tensor,
        sums: Iterable[int] | Tensor,
        counts: Iterable[int] | Tensor,
    ) -> None:
        if not 0 < bound < float("inf"):
            raise ValueError(f"the bound {bound!r} of statistics must be positive and finite")
        self.bound, self.pool_size = float(bound), pool_size
        self.indices, self.sums, self.counts = (
            torch.as_tensor(v if isinstance(v, Tensor) else list(v), dtype=torch.int64)
            for v in (indices, sums, counts)
        )
        if self.indices.ndim != 1 or not self.indices.shape == self.sums.shape == self.counts.shape:
            raise ValueError("indices, sums and counts must be three vectors of one length")
        if bool((self.indices[1:] <= self.indices[:-1]).any()) or (
            len(self.indices) and not 0 <= int(self.indices[0]) <= int(self.indices[-1]) < pool_size
        ):
            raise ValueError(f"indices of statistics must ascend and be in [0, {pool_size})")
        if bool((self.counts < 0).any()) or bool((self.counts > LARGEST_COUNT).any()):
            raise ValueError(f"counts must be in [0, {LARGEST_COUNT}]")
        if bool((self.sums < 0).any()) or bool((self.sums > self.counts * STEPS).any()):
            raise ValueError("a sum of |g| is below 0, or exceeds the bound a measurement")

    @classmethod
    def of(
        cls, bound: float, pool_size: int, measured: Mapping[int, Iterable[float]]
    ) -> SeedStatistics:
        """Statistics of the slopes g, each within the bound, that were measured along each seed."""
        indices = sorted(measured)
        slopes = [[abs(g) for g in measured[index]] for index in indices]
        sums = [sum(min(STEPS, round(g / bound * STEPS)) for g in found) for found in slopes]
        return cls(bound, pool_size, indices, sums, [len(found) for found in slopes])

    def on(self, indices: Tensor) -> SeedStatistics:
        """The same with zeros for more seeds. ValueError where one of its own is not among them."""
        places = torch.searchsorted(indices, self.indices)
        if len(self.indices) and (
            int(places[-1]) >= len(indices) or not torch.equal(indices[places], self.indices)
        ):
            raise ValueError("there are statistics of seeds that are not listed")
        sums, counts = (torch.zeros(len(indices), dtype=torch.int64) for _ in range(2))
        sums[places], counts[places] = self.sums, self.counts
        return SeedStatistics(self.bound, self.pool_size, indices, sums, counts)

    def __add__(self, other: SeedStatistics) -> SeedStatistics:
        """The statistics of both sets of measurements, exactly."""
        if not isinstance(other, SeedStatistics):
            return NotImplemented
        if (self.bound, self.pool_size) != (other.bound, other.pool_size):
            raise ValueError("statistics of another pool or bound cannot be added")
        indices = torch.unique(torch.cat([self.indices, other.indices]))
        mine, theirs = self.on(indices), other.on(indices)
        return SeedStatistics(
            self.bound,
            self.pool_size,
            indices,
            mine.sums + theirs.sums,
            mine.counts + theirs.counts,
        )

    def levels(self) -> bytes:
        """The mean |g| of every seed of the pool between the least and the largest, in 255 steps.

        A seed that nobody measured stands at the mean of the others. All are 0 where nothing tells
        seeds apart.
        """
        known = self.counts > 0
        levels = torch.zeros(self.pool_size, dtype=torch.float64)
        if not bool(known.any()):
            return bytes(self.pool_size)
        means = self.sums[known].double() / self.counts[known].double()
        least, largest = float(means.min()), float(means.max())
        if least == largest:
            return bytes(self.pool_size)
        # Not Tensor.sum: how it orders float sums depends on the processor.
        levels += sum(means.tolist()) / len(means)
        levels[self.indices[known]] = means
        steps = ((levels - least) / (largest - least) * TOP_LEVEL).round()
        return bytes(steps.to(torch.uint8).tolist())

    def parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors, numbers as narrow as they fit; ``from_parts`` inverts them exactly."""
        header = {"bound": self.bound, "pool": self.pool_size}
        vectors = {"indices": self.indices, "sums": self.sums, "counts": self.counts}
        return header, {name: _narrow(vector) for name, vector in vectors.items()}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SeedStatistics:
        """What ``parts`` wrote."""
        vectors = (tensors[name].to(torch.int64) for name in ("indices", "sums", "counts"))
        return cls(header["bound"], header["pool"], *vectors)

    def __eq__(self, other: object) -> bool:
        """Equal pools, bounds, seeds, sums and counts."""
        return (
            isinstance(other, SeedStatistics)
            and (self.bound, self.pool_size) == (other.bound, other.pool_size)
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.sums, other.sums)
            and torch.equal(self.counts, other.counts)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SeedStatistics({int((self.counts > 0).sum())} of {self.pool_size})"


def _narrow(vector: Tensor) -> Tensor:
    largest = int(vector.max()) if len(vector) else 0
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64)
    return vector.to(next(kind for kind in kinds if largest <= torch.iinfo(kind).max))

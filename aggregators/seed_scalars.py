"""The zeroth-order family: scalars along probes of a shared pool of seeds.

FedKSeed (Qin et al., 2024): a pool of K seeds is fixed for the run, a node's walk is a sum of steps
along their probes, so its whole change is one scalar for each seed that it used.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.layout import Layout
from aggregators.reach import EVERYTHING, Reach
from aggregators.seed_statistics import SeedStatistics
from aggregators.sketch import Sketch
from aggregators.update import require_layout

LARGEST_POOL = 1 << 24


class SeedScalars:
    """change = sum_j scalars[j] * z(derive_seed(master_seed, indices[j])), over the tensors ``names``.

    indices: int64 [n], ascending, each in [0, pool_size); scalars: float64 [n]. ``probe`` is one of
    fedkernels.PROBES. ``names``: the tensors that the probes reach, None: all of the layout. Updates
    of one pool and the same tensors add by index. ``reach``: what of those tensors each probe moves.
    Raises ValueError for anything else.

    ``statistics``: what was measured along the seeds ``indices``, where the run draws seeds by it. They
    say nothing of the change: sums of updates have those of both, a multiple of an update has none.
    """

    family: ClassVar[str] = "seed_scalars"

    def __init__(
        self,
        layout: Layout,
        master_seed: int,
        pool_size: int,
        indices: Iterable[int] | Tensor,
        scalars: Iterable[float] | Tensor,
        probe: str = "rademacher",
        names: Collection[str] | None = None,
        statistics: SeedStatistics | None = None,
        reach: Reach = EVERYTHING,
    ) -> None:
        if not 0 <= master_seed < 2**63:
            raise ValueError(f"master_seed must be in [0, 2**63), and it is {master_seed}")
        if not 1 <= pool_size <= LARGEST_POOL:
            raise ValueError(f"pool_size must be in [1, {LARGEST_POOL}], and it is {pool_size}")
        if probe not in fk.PROBES:
            raise ValueError(f"unknown probe {probe!r}; available: {', '.join(fk.PROBES)}")
        if unknown := [name for name in names or () if name not in layout]:
            raise ValueError(f"the layout has no tensor {unknown[0]!r}")
        scope = tuple(spec for spec in layout if names is None or spec.name in names)
        if not scope:
            raise ValueError("names must have a tensor, or be None for all of them")
        self._layout = layout
        self._scope = scope
        self.reach = reach
        self._block = reach.block_of(layout, [spec.name for spec in scope])
        self.master_seed, self.pool_size, self.probe = master_seed, pool_size, probe
        self.indices = torch.as_tensor(_as_list(indices), dtype=torch.int64)
        self.scalars = torch.as_tensor(_as_list(scalars), dtype=torch.float64)
        if self.indices.ndim != 1 or self.indices.shape != self.scalars.shape:
            raise ValueError("indices and scalars must be two vectors of one length")
        if len(self.indices) and not 0 <= int(self.indices[0]) <= int(self.indices[-1]) < pool_size:
            raise ValueError(f"indices must be in [0, {pool_size})")
        if bool((self.indices[1:] <= self.indices[:-1]).any()):
            raise ValueError("indices must ascend: each stands once")
        if not bool(torch.isfinite(self.scalars).all()):
            raise ValueError("scalars must be finite")
        if statistics is not None and (
            statistics.pool_size != pool_size or not torch.equal(statistics.indices, self.indices)
        ):
            raise ValueError("statistics are of other seeds than the scalars")
        self.statistics = statistics

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        return self._layout

    @property
    def names(self) -> tuple[str, ...] | None:
        """The tensors that the probes reach, in the layout's order; None: all."""
        if len(self._scope) == len(self._layout):
            return None
        return tuple(spec.name for spec in self._scope)

    @property
    def seeds(self) -> list[int]:
        """The probes' seeds, in the order of the scalars."""
        return [fk.derive_seed(self.master_seed, index) for index in self.indices.tolist()]

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The change as float64 tensors: all that the probes reach, none where no seed was used."""
        require_layout(layout or self.layout, self.layout)
        if len(self.indices) == 0:
            return {}
        return {spec.name: self.dense_tensor(spec.name) for spec in self._scope}

    def dense_tensor(self, name: str) -> Tensor:
        """The change of one tensor, float64; probes are made one at a time."""
        shape, tensor_id = self.layout.shape(name), self.layout.tensor_id(name)
        total = torch.zeros(shape, dtype=torch.float64)
        places = zip(self.indices.tolist(), self.seeds, self.scalars.tolist(), strict=True)
        for index, seed, scalar in places:
            if index % self.reach.blocks == self._block[name]:
                total += scalar * fk.noise(seed, tensor_id, shape, self.probe).double()
        mask = self.reach.mask(self.master_seed, tensor_id, shape)
        return total if mask is None else total * mask

    def __mul__(self, coefficient: float) -> SeedScalars:
        return self._with(self.indices, self.scalars * float(coefficient))

    __rmul__ = __mul__

    def __add__(self, other: SeedScalars) -> SeedScalars:
        if not isinstance(other, SeedScalars):
            return NotImplemented
        require_layout(other.layout, self.layout)
        if self.pool != other.pool:
            raise ValueError(f"the pool {other.pool} is not {self.pool}: scalars cannot be added")
        indices, places = torch.unique(
            torch.cat([self.indices, other.indices]), return_inverse=True
        )
        totals = torch.zeros(len(indices), dtype=torch.float64)
        totals.index_add_(0, places[: len(self.indices)], self.scalars)
        totals.index_add_(0, places[len(self.indices) :], other.scalars)
        found = [s for s in (self.statistics, other.statistics) if s is not None]
        joint = functools.reduce(operator.add, found).on(indices) if found else None
        return self._with(indices, totals, joint)

    def __sub__(self, other: SeedScalars) -> SeedScalars:
        return self + other * -1.0

    def __eq__(self, other: object) -> bool:
        """Equal pools, indices, scalars and statistics, bit for bit."""
        return (
            isinstance(other, SeedScalars)
            and self.layout == other.layout
            and self.pool == other.pool
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.scalars, other.scalars)
            and self.statistics == other.statistics
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def pool(self) -> tuple[int, int, str, tuple[str, ...] | None, Reach]:
        """What must agree for scalars to be of one pool: master seed, size, probe, tensors, reach."""
        return self.master_seed, self.pool_size, self.probe, self.names, self.reach

    def squared_norm(self) -> float:
        """Sum of squares of all elements; probes are not quite orthogonal, so they are made."""
        return self.inner(self)

    def expected_squared_norm(self) -> float:
        """Mean of the squared norm over the choice of the probes' seeds; needs no probe.

        Independent probes of unit variance are orthogonal on average.
        """
        return float((self.scalars.square() * self.elements()).sum())

    def elements(self) -> Tensor:
        """How many elements the probe of each scalar moves, of a sparse one on average: float64 [n]."""
        found = torch.zeros(self.reach.blocks, dtype=torch.float64)
        for spec in self._scope:
            found[self._block[spec.name]] += math.prod(spec.shape) * self.reach.density
        return found[self.indices % self.reach.blocks]

    def inner(self, other: Any) -> float:
        """Inner product with an update of any family, tensor by tensor."""
        require_layout(other.layout, self.layout)
        if isinstance(other, Sketch):
            return other.inner(self)
        if len(self.indices) == 0:
            return 0.0
        theirs = None if isinstance(other, SeedScalars) else other.dense()
        total = 0.0
        reached = {spec.name for spec in self._scope}
        if isinstance(other, SeedScalars):
            reached &= {spec.name for spec in other._scope}
        for spec in self._scope:
            if spec.name not in (reached if theirs is None else theirs):
                continue
            mine = self.dense_tensor(spec.name)
            if other is self:
                second = mine
            elif theirs is None:
                second = other.dense_tensor(spec.name)
            else:
                second = theirs[spec.name]
            total += float((mine * second).sum())
        return total

    def __repr__(self) -> str:
        return f"SeedScalars({len(self.indices)} of {self.pool_size}, {self.probe})"

    def _with(
        self, indices: Tensor, scalars: Tensor, statistics: SeedStatistics | None = None
    ) -> SeedScalars:
        return SeedScalars(
            self.layout, self.master_seed, self.pool_size, indices, scalars, self.probe, self.names,
            statistics, self.reach,
        )  # fmt: skip


def _as_list(values: Any) -> Any:
    return values if isinstance(values, Tensor) else list(values)

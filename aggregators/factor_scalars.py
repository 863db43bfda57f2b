"""Zeroth-order scalars along probes of LoRA's B, beside an A that a seed stands for.

    change of t = scale * (sum_j scalars[j] z_j[t]) A_t,  z_j[t] the probe's [out, r] part, A_t [r, in]

With A fixed (FFA-LoRA, Sun et al., 2024) the change is linear in the scalars, so updates of a few
hundred bytes add by index, and what they add up to is a low-rank change of rank r.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.seed_scalars import SeedScalars
from aggregators.seed_statistics import SeedStatistics
from aggregators.shared_factors import factor_layout, shared_a
from aggregators.update import require_layout

LARGEST_RANK = 1 << 12


class FactorScalars:
    """``scalars``: seed scalars in the layout of the B of the matrices ``names`` (``factor_layout``).

    ``scale``: LoRA's alpha / r; ``shared_seed``: what A stands for. Updates of one pool, the same
    matrices, rank, scale and A add by index. Raises ValueError for anything else.
    """

    family: ClassVar[str] = "factor_scalars"

    def __init__(
        self,
        layout: Layout,
        names: Sequence[str],
        rank: int,
        scale: float,
        shared_seed: int,
        scalars: SeedScalars,
    ) -> None:
        if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
            raise ValueError(f"rank must be in [1, {LARGEST_RANK}], and it is {rank!r}")
        if type(scale) not in (int, float) or not 0 < scale < 1e6:
            raise ValueError(f"scale must be positive and below 1e6, and it is {scale!r}")
        if type(shared_seed) is not int or not 0 <= shared_seed < 2**63:
            raise ValueError(f"shared_seed must be in [0, 2**63), and it is {shared_seed!r}")
        if unknown := [name for name in names if name not in layout]:
            raise ValueError(f"the layout has no tensor {unknown[0]!r}")
        if scalars.layout != factor_layout(layout, names, rank):
            raise ValueError("scalars are not along probes of these matrices' factors")
        self._layout = layout
        self.rank, self.scale, self.shared_seed = rank, float(scale), shared_seed
        self.scalars = scalars

    @property
    def layout(self) -> Layout:
        """The coordinate system of the weights."""
        return self._layout

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices that are changed, in the layout's order."""
        return tuple(spec.name for spec in self.scalars.layout)

    @property
    def statistics(self) -> SeedStatistics | None:
        """What was measured along the seeds."""
        return self.scalars.statistics

    @property
    def pool(self) -> tuple[Any, ...]:
        """What must agree for scalars to add."""
        return *self.scalars.pool, self.names, self.rank, self.scale, self.shared_seed

    def low_rank(self) -> LowRank:
        """The change as a stack: B made of its probes in float64, beside A."""
        factors = {}
        for name, b in self.scalars.dense().items():
            columns, tensor_id = self.layout.shape(name)[1], self.layout.tensor_id(name)
            factors[name] = (
                b,
                shared_a(self.shared_seed, tensor_id, b.shape[1], columns),
                self.scale,
            )
        return LowRank(self.layout, factors)

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The change as float64 tensors; none where no seed was used."""
        require_layout(layout or self.layout, self.layout)
        return self.low_rank().dense()

    def __mul__(self, coefficient: float) -> FactorScalars:
        return self._with(self.scalars * coefficient)

    __rmul__ = __mul__

    def __add__(self, other: FactorScalars) -> FactorScalars:
        if not isinstance(other, FactorScalars):
            return NotImplemented
        require_layout(other.layout, self.layout)
        if self.pool != other.pool:
            raise ValueError("scalars of other factors cannot be added")
        return self._with(self.scalars + other.scalars)

    def __sub__(self, other: FactorScalars) -> FactorScalars:
        return self + other * -1.0

    def __eq__(self, other: object) -> bool:
        """Equal factors and scalars, bit for bit."""
        return (
            isinstance(other, FactorScalars)
            and self.layout == other.layout
            and self.pool == other.pool
            and self.scalars == other.scalars
        )

    __hash__ = None  # type: ignore[assignment]

    def squared_norm(self) -> float:
        """Sum of squares of all elements of the change."""
        return self.low_rank().squared_norm()

    def expected_squared_norm(self) -> float:
        """Mean of the squared norm over the choice of the probes' seeds; needs no probe.

        A's entries are 1 / sqrt(3 in) in size, so a row of B with r entries of unit variance becomes
        one of squared length r / 3.
        """
        return self.scalars.expected_squared_norm() * self.scale**2 / 3

    def inner(self, other: Any) -> float:
        """Inner product with an update of any family."""
        require_layout(other.layout, self.layout)
        theirs = other.low_rank() if isinstance(other, FactorScalars) else other
        return float(self.low_rank().inner(theirs))

    def __repr__(self) -> str:
        used = f"{len(self.scalars.indices)} of {self.scalars.pool_size}"
        return f"FactorScalars({used}, {len(self.names)} tensors, rank {self.rank})"

    def _with(self, scalars: SeedScalars) -> FactorScalars:
        return FactorScalars(
            self.layout, self.names, self.rank, self.scale, self.shared_seed, scalars
        )


def lora_scale(alpha: float, rank: int, rslora: bool) -> float:
    """s in the change s B A: alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski, 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)

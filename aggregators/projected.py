"""The projected family: a first-order change, seen through random probes (Ferret, Shu et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.layout import Layout
from aggregators.update import require_layout


class ProjectedGradient:
    """change of a tensor = 1/K * sum_k coordinates[k] * z_k, z_k = z(derive_seed(master_seed, k)).

    ``coordinates``: name -> float64 [K], K >= 1 and each tensor's own. Coordinate k of a change D is
    <D, z_k>, and then the expected value of the sum over seeds is D: probes have unit variance, so the
    scale is 1/K. Updates of one master seed add by coordinate. Raises ValueError for tensors that the
    layout does not have, for shapes that do not fit and for values that are not finite.
    """

    family: ClassVar[str] = "projected_gradient"

    def __init__(
        self,
        layout: Layout,
        master_seed: int,
        coordinates: Mapping[str, Tensor],
        probe: str = "rademacher",
    ) -> None:
        if not 0 <= master_seed < 2**63:
            raise ValueError(f"master_seed must be in [0, 2**63), and it is {master_seed}")
        if probe not in fk.PROBES:
            raise ValueError(f"unknown probe {probe!r}; available: {', '.join(fk.PROBES)}")
        self._layout = layout
        self.master_seed, self.probe = master_seed, probe
        self.coordinates: dict[str, Tensor] = {}
        for name in sorted(coordinates, key=lambda n: layout.tensor_id(n) if n in layout else -1):
            if name not in layout:
                raise ValueError(f"the layout has no tensor {name!r}")
            values = torch.as_tensor(coordinates[name], dtype=torch.float64)
            if values.ndim != 1 or len(values) < 1:
                raise ValueError(f"layer {name!r}: coordinates must be a vector, not empty")
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"layer {name!r}: coordinates must be finite")
            self.coordinates[name] = values

    @classmethod
    def of(
        cls,
        layout: Layout,
        master_seed: int,
        change: Mapping[str, Tensor],
        counts: Mapping[str, int],
        probe: str = "rademacher",
    ) -> ProjectedGradient:
        """Project ``change`` (name -> tensor of the layout's shape) on ``counts[name]`` probes each."""
        found = {}
        for name, tensor in change.items():
            if tuple(tensor.shape) != layout.shape(name):
                raise ValueError(f"layer {name!r}: shape {list(tensor.shape)} is not the layout's")
            seeds = [fk.derive_seed(master_seed, k) for k in range(counts[name])]
            tensor_id = layout.tensor_id(name)
            found[name] = torch.tensor(
                [
                    float((tensor.double() * fk.noise(seed, tensor_id, tensor.shape, probe)).sum())
                    for seed in seeds
                ],
                dtype=torch.float64,
            )
        return cls(layout, master_seed, found, probe)

    @property
    def layout(self) -> Layout:
        """The coordinate system."""
        return self._layout

    @property
    def counts(self) -> dict[str, int]:
        """K of each tensor."""
        return {name: len(values) for name, values in self.coordinates.items()}

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The change as float64 tensors, for the tensors that it touches."""
        require_layout(layout or self.layout, self.layout)
        return {name: self.dense_tensor(name) for name in self.coordinates}

    def dense_tensor(self, name: str) -> Tensor:
        """The change of one tensor, float64; probes are made one at a time."""
        shape, tensor_id = self.layout.shape(name), self.layout.tensor_id(name)
        values = self.coordinates[name]
        total = torch.zeros(shape, dtype=torch.float64)
        for k, value in enumerate((values / len(values)).tolist()):
            seed = fk.derive_seed(self.master_seed, k)
            total += value * fk.noise(seed, tensor_id, shape, self.probe).double()
        return total

    def __mul__(self, coefficient: float) -> ProjectedGradient:
        scaled = {name: values * float(coefficient) for name, values in self.coordinates.items()}
        return ProjectedGradient(self.layout, self.master_seed, scaled, self.probe)

    __rmul__ = __mul__

    def __add__(self, other: ProjectedGradient) -> ProjectedGradient:
        if not isinstance(other, ProjectedGradient):
            return NotImplemented
        require_layout(other.layout, self.layout)
        if (self.master_seed, self.probe) != (other.master_seed, other.probe):
            raise ValueError("projections on other probes cannot be added by coordinate")
        total = dict(self.coordinates)
        for name, values in other.coordinates.items():
            if name in total and len(total[name]) != len(values):
                raise ValueError(
                    f"layer {name!r}: {len(values)} coordinates cannot be added to"
                    f" {len(total[name])}"
                )
            total[name] = total[name] + values if name in total else values
        return ProjectedGradient(self.layout, self.master_seed, total, self.probe)

    def __sub__(self, other: ProjectedGradient) -> ProjectedGradient:
        return self + other * -1.0

    def __eq__(self, other: object) -> bool:
        """Equal probes and coordinates, bit for bit."""
        return (
            isinstance(other, ProjectedGradient)
            and self.layout == other.layout
            and (self.master_seed, self.probe) == (other.master_seed, other.probe)
            and self.coordinates.keys() == other.coordinates.keys()
            and all(torch.equal(v, other.coordinates[n]) for n, v in self.coordinates.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def squared_norm(self) -> float:
        """Sum of squares of all elements; probes are not quite orthogonal, so they are made."""
        return self.inner(self)

    def expected_squared_norm(self) -> float:
        """Mean of the squared norm over the choice of the probes' seeds; needs no probe."""
        return sum(
            float((values / len(values)).square().sum()) * math.prod(self.layout.shape(name))
            for name, values in self.coordinates.items()
        )

    def inner(self, other: Any) -> float:
        """Inner product with an update of any family, tensor by tensor."""
        require_layout(other.layout, self.layout)
        theirs = {} if other is self else other.dense()
        total = 0.0
        for name in self.coordinates:
            if other is not self and name not in theirs:
                continue
            mine = self.dense_tensor(name)
            total += float((mine * (mine if other is self else theirs[name])).sum())
        return total

    def __repr__(self) -> str:
        counts = sorted(set(self.counts.values()))
        return f"ProjectedGradient({len(self.coordinates)} tensors, K {counts}, {self.probe})"


# E[z^4] of the probes' elements, where the variance is 1.
KURTOSIS = {"rademacher": 1.0, "popcount": 3.0 - 2.0 / 32, "gaussian": 3.0, "rank1": 1.0}


def shrinkage(update: ProjectedGradient) -> dict[str, float]:
    """K / (K + d + kurtosis - 2) by tensor: the gain of least mean squared error, d its elements.

    E |c/K sum <D, z> z - D|^2 is least for this c where D is any change of d elements.
    """
    gains = {}
    for name, count in update.counts.items():
        size = math.prod(update.layout.shape(name))
        gains[name] = count / (count + size + KURTOSIS[update.probe] - 2)
    return gains

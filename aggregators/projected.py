"""The projected family: a first-order change, seen through random probes (Ferret, Shu et al., 2024)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import fedkernels as fk
from aggregators.along_probes import probe_products, probe_sum
from aggregators.layout import Layout
from aggregators.sketch import Sketch
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
        seeds = _pool(master_seed, max((counts[name] for name in change), default=0))
        for name, tensor in change.items():
            if tuple(tensor.shape) != layout.shape(name):
                raise ValueError(f"layer {name!r}: shape {list(tensor.shape)} is not the layout's")
            tensor_id = layout.tensor_id(name)
            found[name] = probe_products(tensor, seeds[: counts[name]], tensor_id, probe)
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
        """The change of one tensor, float64."""
        values = self.coordinates[name]
        return probe_sum(
            self.layout.shape(name),
            self._seeds[: len(values)],
            values / len(values),
            self.layout.tensor_id(name),
            self.probe,
        )

    def shrunk(self) -> ProjectedGradient:
        """The same direction at the length of least expected squared error (``shrinkage``).

        What a projection stands for is unbiased, and sqrt((K + d) / K) times too long: averaging over
        rounds takes that away. Error feedback cannot, for a residual would grow by sqrt(d / K) a
        round; it needs this scale, of which what is left is shorter than what was.
        """
        scaled = {}
        for name, values in self.coordinates.items():
            elements = math.prod(self.layout.shape(name))
            scaled[name] = values * shrinkage(len(values), elements, self.probe)
        return ProjectedGradient(self.layout, self.master_seed, scaled, self.probe)

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
        if isinstance(other, Sketch):
            return other.inner(self)
        theirs = {} if other is self else other.dense()
        total = 0.0
        for name in self.coordinates:
            if other is not self and name not in theirs:
                continue
            mine = self.dense_tensor(name)
            total += float((mine * (mine if other is self else theirs[name])).sum())
        return total

    @functools.cached_property
    def _seeds(self) -> list[int]:
        return _pool(self.master_seed, max(self.counts.values(), default=0))

    def __repr__(self) -> str:
        counts = sorted(set(self.counts.values()))
        return f"ProjectedGradient({len(self.coordinates)} tensors, K {counts}, {self.probe})"


# E[z^4] of an element of a probe: what the squared length of a probe varies by.
KURTOSIS = {"rademacher": 1.0, "popcount": 3.0 - 2.0 / 32, "gaussian": 3.0, "rank1": 1.0}


def shrinkage(count: int, elements: int, probe: str = "rademacher") -> float:
    """K / (K + d + kappa - 2): the c that minimises E || c/K sum_k <D, z_k> z_k - D ||^2.

    It is <D, E> / E||.||^2 of the unbiased estimate, whose mean is D and whose second moment is
    ||D||^2 (K + d + kappa - 2) / K, kappa the fourth moment of a probe's elements. For rank-one probes
    elements are only pairwise independent, but their squared length is always d, as if kappa were 1.
    """
    return count / (count + elements + KURTOSIS[probe] - 2.0)


def allocation(norms: Mapping[str, float], total: int) -> dict[str, int]:
    """``total`` probes over tensors in proportion to ``norms``, at least one each.

    ``norms``: name -> norm of the last aggregate's change, known to all. Largest remainders get what
    rounding leaves, ties go by name; all zero means equal parts. ValueError for a norm that is negative
    or not finite, and for fewer probes than tensors.
    """
    if total < len(norms):
        raise ValueError(f"{total} probes are too few for {len(norms)} tensors")
    if not all(math.isfinite(norm) and norm >= 0 for norm in norms.values()):
        raise ValueError("norms must be finite and not negative")
    spare = total - len(norms)
    largest = max(norms.values(), default=0.0)
    # Relative to the largest, so that no sum overflows and equal ratios give equal parts.
    parts = {name: norm / largest if largest > 0 else 1.0 for name, norm in norms.items()}
    whole = math.fsum(parts.values())
    shares = {name: spare * part / whole for name, part in parts.items()}
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (counts[name] - shares[name], name))
    for name in by_remainder[: spare - sum(counts.values())]:
        counts[name] += 1
    return {name: 1 + counts[name] for name in norms}


# One for each probe, and the same for every tensor, node and pass of a round.
@functools.lru_cache(maxsize=8)
def _pool(master_seed: int, count: int) -> list[int]:
    return [fk.derive_seed(master_seed, k) for k in range(count)]

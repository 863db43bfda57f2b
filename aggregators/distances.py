"""How far each update of a family lies from the family's mean, and whether the others go its way.

Changes are compared as vectors that keep their inner products, tensor by tensor, and never all pairs:
with the mean, which is made once. A stack of factors is such a vector after two QR decompositions, since
with [B_1 ... B_n] = Q_b R_b and [A_1^T ... A_n^T] = Q_a R_a the change B_i A_i has the inner products of
the small R_b[:, i] R_a[:, i]^T. For n updates of rank r that is O((n r)^2) a row and column of a matrix,
and no more than O(n r) an element where n r is as large as the matrix.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from aggregators.dense import Dense
from aggregators.factor_scalars import FactorScalars
from aggregators.layout import Layout
from aggregators.low_rank import Factors, LowRank
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.totals import SCALARS, tensor_of
from aggregators.update import Update, require_layout

# A length below this share of what it was subtracted from is what float64 rounded, and so is a cosine.
ROUNDING = 1e-12
CANCELLED = 1e-6
"""A difference whose square is below this share of its terms' has lost three digits and more."""


@dataclass(frozen=True)
class Member:
    """What stands in a family's mean: an update of one family, and its weight there.

    ``held``: the weight of single tensors where it is another one, as of a mean of several updates that
    do not all have the tensor.
    """

    update: Update
    weight: float
    held: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Distance:
    """``norm`` of the update, its ``distance`` from the family's weighted mean, which it is part of, and
    its ``cosine`` to the weighted mean of the others; None where there are no others, or where either
    of the two is zero."""

    norm: float
    distance: float
    cosine: float | None


def distances(
    members: Sequence[Member],
    layout: Layout,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> list[Distance]:
    """Of the updates of one family in one round, in their order; ``tell``: parts done, of how many.

    A tensor's mean is over the members that have it, as in ``aggregate``; one that a member does not
    have says nothing of it. Lengths and products are those of the change for "low_rank" and "dense",
    and of the coordinates for "sketch". For updates along probes ("seed_scalars", "factor_scalars",
    "projected_gradient") they are the expected ones over the choice of the seeds, as in
    ``expected_squared_norm``: probes are orthogonal on average, and making them would cost as much as a
    replay. So updates along unlike probes have the cosine 0.

    Raises ValueError for several families, for updates that do not add (another layout, pool, basis or
    number of coordinates), for a pair or a cohort, and for weights that are not positive.
    """
    for member in members:
        require_layout(member.update.layout, layout)
        if not all(math.isfinite(w) and w > 0 for w in (member.weight, *member.held.values())):
            raise ValueError(f"weight {member.weight!r} is not a positive number")
    updates = [member.update for member in members]
    if len({_space(update) for update in updates}) > 1:
        raise ValueError("updates of unlike families, pools or bases have no common mean")
    parts = [frozenset(_keys(update)) for update in updates]
    keys = list(dict.fromkeys(key for update in updates for key in _keys(update)))
    sums = [_Sums() for _ in members]
    for done, key in enumerate(keys):
        tell(done, len(keys))
        having = [place for place, found in enumerate(parts) if key in found]
        weights = [members[p].held.get(tensor_of(key), members[p].weight) for p in having]
        _compare(
            _vectors_of([updates[place] for place in having], key, weights),
            weights,
            [sums[place] for place in having],
        )
    tell(len(keys), len(keys))
    return [one.distance() for one in sums]


def over_median(found: Sequence[Distance]) -> list[float | None]:
    """Each distance over the median of all; None where that is 0, as it is of one update alone."""
    median = statistics.median([one.distance for one in found]) if found else 0.0
    return [one.distance / median if median > 0 else None for one in found]


@dataclass
class _Sums:
    """Squares and products over the tensors so far; those of ``cosine`` only where there are others."""

    own: float = 0.0
    away: float = 0.0
    compared: float = 0.0
    product: float = 0.0
    others: float = 0.0
    scale: float = 0.0

    def distance(self) -> Distance:
        norm, distance = math.sqrt(self.own), math.sqrt(self.away)
        cosine = None
        if self.compared > 0 and math.sqrt(self.others) > ROUNDING * math.sqrt(self.scale):
            lengths = math.sqrt(self.compared) * math.sqrt(self.others)
            cosine = min(max(self.product / lengths, -1.0), 1.0)
            cosine = cosine if abs(cosine) > ROUNDING else 0.0
        return Distance(norm, distance if distance > ROUNDING * norm else 0.0, cosine)


@dataclass(frozen=True)
class _Vectors:
    """Float64 vectors with the inner products of a part of the changes: each when asked for, and the
    weighted mean of all."""

    mean: Tensor
    of: Callable[[int], Tensor]


def _compare(found: _Vectors, weights: Sequence[float], sums: Sequence[_Sums]) -> None:
    for place, one in enumerate(sums):
        vector = found.of(place)
        square = _product(vector, vector)
        one.own += square
        if len(weights) == 1:
            continue
        away = vector - found.mean
        one.away += _product(away, away)
        others, scale = _mean_of_others(found, weights, place, away)
        one.scale += scale
        one.compared += square
        one.product += _product(vector, others)
        one.others += _product(others, others)


def _mean_of_others(
    found: _Vectors, weights: Sequence[float], place: int, away: Tensor
) -> tuple[Tensor, float]:
    """The mean without one, and the square of the lengths that it is a difference or a sum of."""
    rest = math.fsum(weights) - weights[place]
    # Without a second sum: mean + w / (W - w) (mean - vector).
    away = away * (weights[place] / rest)
    others, scale = found.mean - away, _product(found.mean, found.mean) + _product(away, away)
    if _product(others, others) > CANCELLED * scale:
        return others, scale
    # One so much longer than the others leaves nothing of them in the difference. Few can be.
    others, scale = torch.zeros_like(found.mean), 0.0
    for other, weight in enumerate(weights):
        if other != place:
            part = found.of(other) * (weight / rest)
            others, scale = others + part, scale + _product(part, part)
    return others, scale


def _product(one: Tensor, two: Tensor) -> float:
    return float(torch.dot(one.flatten(), two.flatten()))


def _vectors_of(updates: Sequence[Any], key: str, weights: Sequence[float]) -> _Vectors:
    whole = math.fsum(weights)
    shares = [weight / whole for weight in weights]
    if isinstance(updates[0], LowRank):
        return _of_factors([update.factors[key] for update in updates], shares)
    found = [_coordinates(update, key) for update in updates]
    size, places = _places(updates, found)

    def vector(member: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64).index_copy_(0, places[member], found[member])

    mean = torch.zeros(size, dtype=torch.float64)
    for share, own, values in zip(shares, places, found, strict=True):
        mean.index_add_(0, own, share * values)
    return _Vectors(mean, vector)


def _places(updates: Sequence[Any], found: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
    """How many axes there are, and on which of them the coordinates of each update are."""
    if isinstance(updates[0], SeedScalars | FactorScalars):
        own = [u.scalars.indices if isinstance(u, FactorScalars) else u.indices for u in updates]
        used = torch.unique(torch.cat(own))
        return len(used), [torch.searchsorted(used, indices) for indices in own]
    # Nodes may have probes of their own: each pool has its axes then.
    size, axes, places = 0, dict[Any, Tensor](), []
    for update, values in zip(updates, found, strict=True):
        pool = _pool(update)
        if pool not in axes:
            axes[pool] = torch.arange(size, size + len(values))
            size += len(values)
        if len(axes[pool]) != len(values):
            raise ValueError(
                f"{len(values)} coordinates along a tensor's probes do not add to {len(axes[pool])}"
            )
        places.append(axes[pool])
    return size, places


def _of_factors(stack: Sequence[Factors], shares: Sequence[float]) -> _Vectors:
    ranks = [factors.B.shape[1] for factors in stack]
    left = _triangle(torch.cat([factors.B.double() * factors.scale for factors in stack], dim=1))
    right = _triangle(torch.cat([factors.A.double().T for factors in stack], dim=1))
    columns = [slice(end - rank, end) for rank, end in zip(ranks, accumulate(ranks), strict=True)]
    weights = torch.tensor(shares, dtype=torch.float64).repeat_interleave(torch.tensor(ranks))
    return _Vectors(
        (left * weights) @ right.T,
        lambda place: left[:, columns[place]] @ right[:, columns[place]].T,
    )


def _triangle(stack: Tensor) -> Tensor:
    """R of a QR decomposition, whose columns have the inner products of the stack's; or the stack."""
    rows, columns = stack.shape
    return torch.linalg.qr(stack, mode="r").R if columns < rows else stack


def _coordinates(update: Any, key: str) -> Tensor:
    """A part of an update as a float64 vector; along probes each in units of its expected length."""
    if isinstance(update, SeedScalars):
        return update.scalars * update.elements().sqrt()
    if isinstance(update, FactorScalars):
        return _coordinates(update.scalars, key) * (update.scale / math.sqrt(3))
    if isinstance(update, ProjectedGradient):
        values = update.coordinates[key]
        return values / len(values) * math.sqrt(math.prod(update.layout.shape(key)))
    if isinstance(update, Dense):
        return update.tensors[key].double().flatten()
    assert isinstance(update, Sketch)
    if key in update.whole:
        return update.whole[key].flatten()
    view = update.views[tensor_of(key)]
    return (view.P if key.endswith("#P") else view.R).flatten()


def _keys(update: Any) -> Collection[str]:
    if isinstance(update, LowRank):
        return update.factors.keys()
    if isinstance(update, SeedScalars | FactorScalars):
        return (SCALARS,)
    if isinstance(update, ProjectedGradient):
        return update.coordinates.keys()
    if isinstance(update, Dense):
        return update.tensors.keys()
    return [f"{name}#{part}" for name in update.views for part in "PR"] + [*update.whole]


def _space(update: Any) -> tuple[Any, ...]:
    """What must agree for updates to have a mean."""
    family: str = update.family
    if isinstance(update, SeedScalars | FactorScalars):
        return family, update.pool
    if isinstance(update, Sketch):
        return family, update.basis_digest
    if isinstance(update, LowRank | Dense | ProjectedGradient):
        return (family,)
    raise ValueError(f"an update of the family {family!r} is of no single family")


def _pool(update: Any) -> tuple[int, str] | None:
    if isinstance(update, ProjectedGradient):
        return update.master_seed, update.probe
    return None

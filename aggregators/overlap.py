"""What the families of a round have in common, and weights that count it once.

Families that changed unlike things add. Families that changed the same thing, each as far as its own
loss asked for, would go that way twice. Gram's matrix of their changes tells the two apart, and
``overlap_weights`` goes from adding to one mean as they do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aggregators.dense import Dense
from aggregators.layout import Layout
from aggregators.low_rank import Factors, LowRank
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.update import Update, require_layout

# Beside the squared distances: which of the weights that fit equally well is taken.
PULL = 1e-6
# Weights are whole multiples of this, so that sums in another order give the same ones.
STEP = 2.0**-16


def gram(families: Sequence[Sequence[Update]], layout: Layout) -> Tensor:
    """Inner products of the families' changes, each the sum of its updates: float64 [F, F].

    Any families of updates but sketches, which are no changes: ``Sketch.reconstruct`` makes one.
    Low-rank changes meet by their factors; of what is along probes one tensor at a time is made.
    """
    for update in itertools.chain.from_iterable(families):
        require_layout(update.layout, layout)
    total = torch.zeros(len(families), len(families), dtype=torch.float64)
    for spec in layout:
        parts = [_part(updates, spec.name) for updates in families]
        for one, two in itertools.combinations_with_replacement(range(len(families)), 2):
            product = _inner(parts[one], parts[two])
            total[one, two] += product
            if one != two:
                total[two, one] += product
    return total


def overlap_weights(products: Tensor, shares: Sequence[float]) -> list[float]:
    """lambda in [0, 1] of each family, for x = sum_f lambda_f u_f.

    ``products`` [F, F] are the <u_f, u_g>; ``shares``, positive, say how much each family is to be
    believed where two do not agree. Along its own direction each family asks for its own length, and

        sum_f share_f (<x, u_f> / |u_f| - |u_f|)^2

    is least; of equal minima the one nearest to the shares. Orthogonal families get 1 each, parallel
    ones their shares of 1: from the sum to the mean, as in between. No weight changes when all u are
    scaled alike. A family without a change gets 1. ValueError for shares that are not positive.
    """
    if len(shares) != len(products) or not all(share > 0 for share in shares):
        raise ValueError(f"shares {list(shares)} are not one positive number a family")
    lengths = products.double().diagonal().clamp_min(0).sqrt()
    moved = [i for i, length in enumerate(lengths.tolist()) if length > 0]
    found = [1.0] * len(shares)
    if not moved:
        return found
    share = torch.tensor([shares[i] for i in moved], dtype=torch.float64)
    share = share / share.sum()
    length = lengths[moved] / lengths.max()
    cosines = products[moved][:, moved] / lengths[moved] / lengths[moved][:, None]
    # Rows: what each family sees of the sum, for weights of 1.
    seen = cosines * length
    trusted = share[:, None] * seen
    pull = PULL * share * length.square()
    curvature = seen.T @ trusted + torch.diag(pull)
    slope = trusted.T @ length + pull * share
    for place, value in zip(moved, _least_in_box(curvature, slope), strict=True):
        found[place] = round(value / STEP) * STEP
    return found


def _least_in_box(curvature: Tensor, slope: Tensor) -> list[float]:
    """x in [0, 1]^n, n small, where x C x / 2 - slope x is least; C is positive definite.

    Each coordinate is at an end or free: of all 3^n cases the best that is in the box.
    """
    best, value = torch.zeros(len(slope), dtype=torch.float64), float("inf")
    for case in itertools.product((0.0, 1.0, None), repeat=len(slope)):
        x = torch.tensor([end or 0.0 for end in case], dtype=torch.float64)
        free = [i for i, end in enumerate(case) if end is None]
        if free:
            rest = (slope - curvature @ x)[free]
            x[free] = torch.linalg.solve(curvature[free][:, free], rest)
            if bool(((x < 0) | (x > 1)).any()):
                continue
        reached = float(x @ curvature @ x / 2 - slope @ x)
        if reached < value:
            best, value = x, reached
    solved: list[float] = best.tolist()
    return solved


@dataclass(frozen=True)
class _Part:
    """One tensor of a family's change: stacks of factors, and all the rest as one float64 tensor."""

    factors: list[Factors]
    whole: Tensor | None


def _part(updates: Sequence[Update], name: str) -> _Part:
    factors: list[Factors] = []
    whole: Tensor | None = None
    for update in updates:
        if isinstance(update, LowRank):
            factors += [update.factors[name]] if name in update.factors else []
        elif (tensor := _whole(update, name)) is not None:
            whole = tensor if whole is None else whole + tensor
    return _Part(factors, whole)


def _whole(update: Update, name: str) -> Tensor | None:
    if isinstance(update, Dense):
        return update.tensors[name].double() if name in update.tensors else None
    if isinstance(update, ProjectedGradient):
        return update.dense_tensor(name) if name in update.coordinates else None
    if not isinstance(update, SeedScalars):
        raise TypeError(f"an update of the family {update.family!r} is no change of the weights")
    if len(update.indices) == 0 or not (update.names is None or name in update.names):
        return None
    return update.dense_tensor(name)


def _inner(one: _Part, two: _Part) -> float:
    total = 0.0
    for mine, theirs in itertools.product(one.factors, two.factors):
        left = (mine.B.double() * mine.scale).T @ (theirs.B.double() * theirs.scale)
        total += float((left * (mine.A.double() @ theirs.A.double().T)).sum())
    for factors, whole in ((one.factors, two.whole), (two.factors, one.whole)):
        if whole is not None:
            for f in factors:
                left = (f.B.double() * f.scale).T @ whole
                total += float((left * f.A.double()).sum())
    if one.whole is not None and two.whole is not None:
        total += float((one.whole * two.whole).sum())
    return total

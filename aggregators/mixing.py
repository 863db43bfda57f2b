"""Weighted sums of updates: exact within a family, and families add."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from aggregators.codec import encode
from aggregators.cohort import joined, totals_of
from aggregators.dense import Dense
from aggregators.factor_scalars import FactorScalars
from aggregators.layout import Layout
from aggregators.low_rank import LowRank
from aggregators.projected import ProjectedGradient
from aggregators.seed_scalars import SeedScalars
from aggregators.sketch import Sketch
from aggregators.totals import Total, beyond
from aggregators.update import Update, require_layout

Weighted = tuple[Any, float]

FAMILIES = tuple(
    kind.family for kind in (LowRank, SeedScalars, FactorScalars, ProjectedGradient, Sketch, Dense)
)


@dataclass(frozen=True)
class Aggregate:
    """One update per family; ``shares`` are the weights that the inputs got, in input order: of a
    tensor that some of a family do not have, the others got more.

    Projections on probes of several seeds cannot be added by coordinate: there is one a seed then, under
    "projected_gradient/" and the seed.
    """

    updates: dict[str, Update]
    shares: list[float]
    layout: Layout

    def dense(self, layout: Layout | None = None) -> dict[str, Tensor]:
        """The whole change as float64 tensors; of a sketch, which is none yet, its coordinates."""
        require_layout(layout or self.layout, self.layout)
        total: dict[str, Tensor] = {}
        for _, update in sorted(self.updates.items()):
            for name, change in update.dense().items():
                total[name] = total[name] + change if name in total else change
        return total


def aggregate(
    updates: Sequence[Weighted],
    layout: Layout,
    mixing: Literal["add", "mean"] = "add",
    family_weights: Mapping[str, float] | None = None,
) -> Aggregate:
    """The weighted sum of updates, the same bits in whatever order they come.

    "add": sum over families f of lambda_f * (weighted mean within f), lambda_f = 1 by default. The mean
    of a tensor is over the updates of the family that have it: a hybrid node, whose plan gives LoRA the
    upper layers alone, says nothing of the lower ones. One mean over all nodes ("mean") divides by all
    weights, hence the strong families' steps by the share of the weak ones. Both parts of a pair have
    the node's weight, each in its family; its share is the sum of theirs.
    Raises ValueError for no updates, for weights that are not positive and finite, for another layout,
    for family weights that are not finite or name no family.
    """
    if not updates:
        raise ValueError("there are no updates to aggregate")
    if mixing not in ("add", "mean"):
        raise ValueError(f"mixing {mixing!r} is neither 'add' nor 'mean'")
    everyone = _total_weight(updates, layout)
    lambdas = dict(family_weights or {})
    if unknown := sorted(lambdas.keys() - FAMILIES):
        raise ValueError(f"family_weights names {unknown[0]!r}; there are {', '.join(FAMILIES)}")
    if not all(math.isfinite(value) for value in lambdas.values()):
        raise ValueError(f"family weights {lambdas} are not all finite")
    groups: dict[str, list[tuple[int, Total]]] = {}
    for index, (update, weight) in enumerate(updates):
        for total in totals_of(update, weight):
            groups.setdefault(total.family, []).append((index, total))
    shares = [0.0] * len(updates)
    means: dict[str, Update] = {}
    for family, members in sorted(groups.items()):
        within = math.fsum(total.weight for _, total in members)
        own, divisor = lambdas.get(family, 1.0), within if mixing == "add" else everyone
        factor = own / divisor
        for index, total in members:
            shares[index] += own * total.weight / divisor
        # Divided once, at the end: whoever added what to what before, the sum is the same.
        more = beyond([total for _, total in members]) if mixing == "add" else {}
        means |= {
            key: total.times(factor, more) for key, total in _by_pool(family, members).items()
        }
    return Aggregate(means, shares, layout)


def average_factors(updates: Sequence[tuple[LowRank, float]], rank: int) -> LowRank:
    """FedIT done correctly: zero-pad to ``rank``, then average B and A separately.

    The product of the averages has cross terms B_i A_j that no node computed; this is the baseline,
    not the rule. Scales are folded into B; a tensor that a node leaves out counts as zeros. The
    result has scale 1 and the same bits in whatever order the updates come. Raises ValueError as
    ``aggregate`` does, and for a node's rank above ``rank``.
    """
    if not updates:
        raise ValueError("there are no updates to average")
    layout = updates[0][0].layout
    total = _total_weight(updates, layout)
    means: dict[str, tuple[Tensor, Tensor, float]] = {}
    ordered = _canonical_order(updates)
    names = {name for update, _ in updates for name in update.factors}
    for name in sorted(names, key=layout.tensor_id):
        rows, columns = layout.shape(name)
        mean_b = torch.zeros(rows, rank, dtype=torch.float64)
        mean_a = torch.zeros(rank, columns, dtype=torch.float64)
        for update, weight in ordered:
            if name not in update.factors:
                continue
            if update.rank(name) > rank:
                raise ValueError(f"layer {name!r}: rank {update.rank(name)} is above {rank}")
            factors = update.factors[name]
            width = factors.B.shape[1]
            mean_b[:, :width] += (weight / total) * factors.B.double() * factors.scale
            mean_a[:width] += (weight / total) * factors.A.double()
        means[name] = (mean_b.float(), mean_a.float(), 1.0)
    return LowRank(layout, means)


def _by_pool(family: str, members: Sequence[tuple[int, Total]]) -> dict[str, Total]:
    """The totals of a family: one, but of projections one by the seed of their probes."""
    found = sorted(joined(total for _, total in members), key=lambda total: total.pool or 0)
    if len(found) < 2:
        return {family: found[0]}
    return {f"{family}/{total.pool}": total for total in found}


def _total_weight(updates: Sequence[Weighted], layout: Layout) -> float:
    for update, weight in updates:
        require_layout(update.layout, layout)
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight!r} is not a positive number")
    return math.fsum(weight for _, weight in updates)


def _canonical_order(updates: Sequence[Weighted]) -> list[Weighted]:
    """Content decides the order of summation, so the order of arrival cannot."""
    if len(updates) < 2:
        return list(updates)
    return sorted(updates, key=lambda item: (hashlib.sha256(encode(item[0])).digest(), item[1]))
